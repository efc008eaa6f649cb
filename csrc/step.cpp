#include "step.hpp"

#include <chrono>
#include <vector>

#include "buffer.hpp"
#include "score_topk.hpp"

namespace fave_fast {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

}  // namespace

StepSeconds run_step(const Encoder& encoder, const InputPath& path, const StepCall& call, int threads) {
  const auto users = static_cast<std::int64_t>(call.histories.lengths.size());
  if (users == 0) return {0, 0};
  const Clock::time_point begin = Clock::now();
  const std::vector<std::int64_t> ids(call.ids, call.ids + call.count);
  const int d = encoder.config().d;
  Buffer<float> endpoints(users * d);  // room for either format
  encoder.encode_ids(call.histories, ids.data(), path, endpoints.data(), path.format, threads);
  const Clock::time_point encoded = Clock::now();
  const TopkCall lists{endpoints.data(),
                       d,
                       users,
                       path.table,
                       d,
                       path.items,
                       d,
                       path.format,
                       call.k,
                       call.exclude ? ids.data() : nullptr,
                       call.exclude ? call.offsets : nullptr,
                       call.deny,
                       call.scores,
                       call.best};
  score_topk(encoder.kernels(), lists, threads);
  return {seconds_between(begin, encoded), seconds_between(encoded, Clock::now())};
}

}  // namespace fave_fast

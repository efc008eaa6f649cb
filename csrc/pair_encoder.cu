#include "launch.cuh"
#include "pair_encoder.cuh"

namespace fave_fast {
namespace {
static_assert(sizeof(Shared) <= kMostBytes);
}

void launch_pair_encoder(const EncoderCall& call, bool overlap, int device, std::uint64_t stream) {
  const auto start = call.layer_norm ? launch<encode_kernel<true>, EncoderCall>
                                     : launch<encode_kernel<false>, EncoderCall>;
  start(call, {call.users, 2, kThreads, sizeof(Shared)}, overlap, device, stream);
}

}  // namespace fave_fast

#pragma once

#include <cstdint>
#include <mutex>

namespace fave_fast {

// Submits an instantiated CUDA graph and waits for it through the driver, which is loaded at first use: nothing here is
// linked against CUDA. Handles are those of the driver or the runtime, as integers. Throws std::runtime_error with the
// name of the driver's error.

// Puts `graph` (cudaGraphExec_t) on `stream` and returns. A thread without a CUDA context gets the stream's.
void launch_graph(std::uint64_t graph, std::uint64_t stream);

// Spins until the 32-bit word at `flag` (host memory that the device writes) is `expected`: true; or until
// `timeout_seconds` have passed: false. Every millisecond it asks whether `stream` has failed, or is idle without having
// written `expected`, and throws instead of waiting for ever; stream 0 is not asked.
bool wait_flag(std::uint64_t flag, std::uint32_t expected, std::uint64_t stream, double timeout_seconds);

// Makes the 32-bit word at `flag` `value`, for another process or thread that waits by wait_flag: what was written before
// is there for it, too.
void raise_flag(std::uint64_t flag, std::uint32_t value);

// The graphs of one stream, each of which adds one to the same word when it is done. Callers take turns.
class Line {
 public:
  // `count` is what the word at `flag` holds now.
  Line(std::uint64_t flag, std::uint32_t count, std::uint64_t stream) : flag_(flag), stream_(stream), count_(count) {}

  // launch_graph, then wait_flag; in the same turn `before` it and, unless the time is over, `after` it.
  template <typename Before, typename After>
  bool run(std::uint64_t graph, double timeout_seconds, const Before& before, const After& after) {
    const std::lock_guard<std::mutex> turn(alone_);
    before();
    launch_graph(graph, stream_);
    const bool reached = wait_flag(flag_, ++count_, stream_, timeout_seconds);
    if (reached) after();
    return reached;
  }

 private:
  std::mutex alone_;
  const std::uint64_t flag_, stream_;
  std::uint32_t count_;
};

// Where the graph of a request for up to `batch` histories reads and writes in the host's memory.
struct RequestMemory {
  std::int32_t* offsets;          // [batch + 1]
  std::int32_t* exclude_offsets;  // [batch + 1]
  std::int32_t* ids;              // [items]
  const float* scores;            // [batch, k]
  const std::int64_t* best;       // [batch, k]
  std::int64_t batch, items, k;
};

struct NumberedHistories {
  const std::int32_t* ids;      // [offsets[users]]
  const std::int64_t* offsets;  // [users + 1], from 0
  std::int64_t users;
};

// Gives the histories, which fit, to the request; runs it; takes the lists, scores and best [users, k]. With `exclude`
// a history's own items are no candidates. False where the time was over, as in wait_flag.
bool answer(Line& line, std::uint64_t graph, double timeout_seconds, const RequestMemory& memory,
            const NumberedHistories& histories, bool exclude, float* scores, std::int64_t* best);

}  // namespace fave_fast

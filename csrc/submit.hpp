#pragma once

#include <cstdint>

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

}  // namespace fave_fast

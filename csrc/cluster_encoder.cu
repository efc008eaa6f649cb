#include "launch.cuh"
#include "cluster_encoder.cuh"

namespace fave_fast {
namespace {
static_assert(sizeof(Shared) <= kMostBytes);
}

void launch_cluster_encoder(const EncoderCall& call, int tiles, bool overlap, int device, std::uint64_t stream) {
  const auto start = call.layer_norm ? launch<encode_kernel<true>, EncoderCall>
                                     : launch<encode_kernel<false>, EncoderCall>;
  start(call, {call.users, 2 * tiles, kThreads, sizeof(Shared)}, overlap, device, stream);
}

}  // namespace fave_fast

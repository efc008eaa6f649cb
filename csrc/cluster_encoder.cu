#include "cluster_encoder.cuh"
#include "launch.cuh"

namespace fave_fast {

void launch_cluster_encoder(const EncoderCall& call, int tiles, bool overlap, int device, std::uint64_t stream) {
  const auto start = call.layer_norm ? launch<sizeof(Shared), encode_kernel<true>>
                                     : launch<sizeof(Shared), encode_kernel<false>>;
  start(call, call.users, 2 * tiles, kThreads, overlap, device, stream);
}

}  // namespace fave_fast

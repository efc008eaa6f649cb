#include "launch.cuh"
#include "pair_encoder.cuh"

namespace fave_fast {

void launch_pair_encoder(const EncoderCall& call, bool overlap, int device, std::uint64_t stream) {
  const auto start = call.layer_norm ? launch<sizeof(Shared), encode_kernel<true>>
                                     : launch<sizeof(Shared), encode_kernel<false>>;
  start(call, call.users, 2, kThreads, overlap, device, stream);
}

}  // namespace fave_fast

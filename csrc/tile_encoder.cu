#include "launch.cuh"
#include "tile_encoder.cuh"

namespace fave_fast {
namespace {

template <int kTiles>
void launch_tiles(const EncoderCall& call, bool overlap, int device, std::uint64_t stream) {
  constexpr int kBytes = sizeof(Shared<kTiles>);
  const auto start = call.layer_norm ? launch<kBytes, encode_kernel<true, kTiles>>
                                     : launch<kBytes, encode_kernel<false, kTiles>>;
  const int tiles = call.programs == nullptr ? call.users : call.program_count;
  start(call, (tiles + kTiles - 1) / kTiles, 1, kTiles * kWarpgroup, overlap, device, stream);
}

}  // namespace

void launch_tile_encoder(const EncoderCall& call, int tiles, bool overlap, int device, std::uint64_t stream) {
  (tiles == 1 ? launch_tiles<1> : tiles == 2 ? launch_tiles<2> : launch_tiles<4>)(call, overlap, device, stream);
}

}  // namespace fave_fast

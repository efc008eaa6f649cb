#include "launch.cuh"
#include "tile_encoder.cuh"

namespace fave_fast {
namespace {

template <int kTiles>
void launch_tiles(const EncoderCall& call, bool overlap, int device, std::uint64_t stream) {
  static_assert(sizeof(Shared<kTiles>) <= kMostBytes);
  const auto start = call.layer_norm ? launch<encode_kernel<true, kTiles>, EncoderCall>
                                     : launch<encode_kernel<false, kTiles>, EncoderCall>;
  const int tiles = call.programs == nullptr ? call.users : call.program_count;
  const Grid grid{(tiles + kTiles - 1) / kTiles, 1, kTiles * kWarpgroup, sizeof(Shared<kTiles>)};
  start(call, grid, overlap, device, stream);
}

}  // namespace

void launch_tile_encoder(const EncoderCall& call, int tiles, bool overlap, int device, std::uint64_t stream) {
  (tiles == 1 ? launch_tiles<1> : tiles == 2 ? launch_tiles<2> : launch_tiles<4>)(call, overlap, device, stream);
}

}  // namespace fave_fast

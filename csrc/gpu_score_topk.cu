#include "gpu_score_topk.cuh"

#include "launch.cuh"

namespace fave_fast {
namespace {
static_assert(scan_bytes(256, kMostTile) <= kMostBytes);
}

void launch_score_topk(const ListsCall& call, bool overlap, int device, std::uint64_t stream) {
  const auto scan = call.d == 64    ? launch<scan_tile<64>, ListsCall>
                    : call.d == 128 ? launch<scan_tile<128>, ListsCall>
                                    : launch<scan_tile<256>, ListsCall>;
  const int tiles = (call.items + call.tile - 1) / call.tile;
  scan(call, {tiles, 1, kThreads, scan_bytes(call.d, call.tile)}, overlap, device, stream);
  launch<merge_tiles>(call, {call.rows, 1, kThreads, sizeof(Merged)}, true, device, stream);
}

}  // namespace fave_fast

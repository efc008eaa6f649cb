#include "gpu_score_topk.cuh"

#include "launch.hpp"

namespace {

const fave_fast::ListsCall* call;

void scan() {
  call->d == 64 ? fave_fast::scan<64>(*call) : call->d == 128 ? fave_fast::scan<128>(*call) : fave_fast::scan<256>(*call);
}

void merge() { fave_fast::merge(*call); }

}  // namespace

// Both launches; threads take turns `stride` (an odd number) apart. Returns 0, or 1 where one hangs.
extern "C" int emulate(const fave_fast::ListsCall* given, unsigned stride) {
  using fave_fast::kThreads;
  call = given;
  const int tiles = (call->items + call->tile - 1) / call->tile;
  const auto bytes = static_cast<std::size_t>(fave_fast::scan_bytes(call->d, call->tile));
  return emulation::run_all({tiles, 1, kThreads, bytes, stride, scan}) &&
                 emulation::run_all({call->rows, 1, kThreads, sizeof(fave_fast::Merged), stride, merge})
             ? 0
             : 1;
}

extern "C" int call_bytes() { return sizeof(fave_fast::ListsCall); }

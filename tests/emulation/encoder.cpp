#include KERNEL

#include "launch.hpp"

namespace {

#ifdef TILES  // a template over how many a block has
using Memory = fave_fast::Shared<TILES>;
constexpr unsigned kThreads = TILES * fave_fast::kWarpgroup;

template <bool kLayerNorm>
void encode_with(const fave_fast::EncoderCall& call) {
  fave_fast::encode_tiles<kLayerNorm, TILES>(call);
}
#else
using fave_fast::kThreads;
using Memory = fave_fast::Shared;

template <bool kLayerNorm>
void encode_with(const fave_fast::EncoderCall& call) {
  fave_fast::encode_history<kLayerNorm>(call);
}
#endif

const fave_fast::EncoderCall* call;

void encode() { call->layer_norm ? encode_with<true>(*call) : encode_with<false>(*call); }

}  // namespace

// A launch of `clusters` of `blocks`; threads take turns `stride` (an odd number) apart. Returns 0, or 1 where it
// hangs.
extern "C" int emulate(const fave_fast::EncoderCall* given, int clusters, int blocks, unsigned stride) {
  call = given;
  return emulation::run_all({clusters, blocks, kThreads, sizeof(Memory), stride, encode}) ? 0 : 1;
}

extern "C" int call_bytes() { return sizeof(fave_fast::EncoderCall); }

#include KERNEL

namespace {

using namespace emulation;

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

void run() {
  call->layer_norm ? encode_with<true>(*call) : encode_with<false>(*call);
  current->done = true;
  yield();
}

// One cluster; false where its threads wait for one another for ever. Shared memory is all ones (NaN) before.
bool encode(int cluster, int size, unsigned stride) {
  static std::vector<Thread> threads;
  const unsigned count = size * kThreads;
  blocks.assign(size, Block{});
  for (Block& block : blocks) {
    block.bytes.assign(sizeof(Memory) + kAligned, 0xff);
    block.meeting.size = kThreads;
    block.warpgroups.assign(kThreads / 128, Meeting{128});
    block.warps.assign(kThreads / 32, Warp{});
    for (Warp& warp : block.warps) warp.meeting.size = 32;
  }
  arrived_at_cluster = 0;
  threads.resize(std::max<std::size_t>(threads.size(), count));
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.block = i / kThreads, thread.number = i % kThreads, thread.done = false;
    thread.stack.resize(32 << 10);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run, 0);
  }
  for (int round = 0; round < 100000; ++round) {
    bool all_done = true;
    for (unsigned i = 0; i < count; ++i) {
      current = &threads[i * stride % count];
      if (current->done) continue;
      all_done = false;
      threadIdx.x = current->number, blockIdx.x = cluster * size + current->block;
      swapcontext(&scheduler, &current->context);
    }
    if (all_done) return true;
  }
  return false;
}

}  // namespace

// A launch of `clusters` of `blocks`; threads take turns `stride` (an odd number) apart. Returns 0, or 1 where it
// hangs.
extern "C" int emulate(const fave_fast::EncoderCall* given, int clusters, int blocks, unsigned stride) {
  call = given;
  gridDim.x = clusters * blocks;
  for (int cluster = 0; cluster < clusters; ++cluster) {
    if (!encode(cluster, blocks, stride)) return 1;
  }
  return 0;
}

extern "C" int call_bytes() { return sizeof(fave_fast::EncoderCall); }

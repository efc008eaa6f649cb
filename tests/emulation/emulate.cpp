#include "cluster_encoder.cuh"

namespace {

using namespace emulation;

const fave_fast::ClusterEncoderCall* call;

template <int kOwn>
void run() {
  call->layer_norm ? fave_fast::encode_history<kOwn, true>(*call) : fave_fast::encode_history<kOwn, false>(*call);
  current->done = true;
  yield();
}

// One history; false where its threads wait for one another for ever. Shared memory is all ones (NaN) before.
template <int kOwn>
bool encode(int user, int size, unsigned stride) {
  static std::vector<Thread> threads;
  const unsigned count = size * kThreads;
  blocks.assign(size, Block{});
  for (Block& block : blocks) {
    block.memory.assign(sizeof(fave_fast::Shared<kOwn>), 0xff);
    block.meeting.size = kThreads;
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
    makecontext(&thread.context, run<kOwn>, 0);
  }
  for (int round = 0; round < 100000; ++round) {
    bool all_done = true;
    for (unsigned i = 0; i < count; ++i) {
      current = &threads[i * stride % count];
      if (current->done) continue;
      all_done = false;
      threadIdx.x = current->number, blockIdx.x = user * size + current->block;
      swapcontext(&scheduler, &current->context);
    }
    if (all_done) return true;
  }
  return false;
}

}  // namespace

// The launch of csrc/cluster_encoder.cu; threads take turns `stride` (an odd number) apart. Returns 0, or 1 where it
// hangs.
extern "C" int emulate(const fave_fast::ClusterEncoderCall* given, int tiles, int own, unsigned stride) {
  call = given;
  for (int user = 0; user < given->users; ++user) {
    if (!(own == 1 ? encode<1> : encode<4>)(user, 2 * tiles / own, stride)) return 1;
  }
  return 0;
}

extern "C" int call_bytes() { return sizeof(fave_fast::ClusterEncoderCall); }

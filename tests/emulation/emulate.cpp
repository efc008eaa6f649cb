#include KERNEL

namespace {

using namespace emulation;

const fave_fast::EncoderCall* call;

void run() {
  call->layer_norm ? fave_fast::encode_history<true>(*call) : fave_fast::encode_history<false>(*call);
  current->done = true;
  yield();
}

// One history; false where its threads wait for one another for ever. Shared memory is all ones (NaN) before.
bool encode(int user, int size, unsigned stride) {
  static std::vector<Thread> threads;
  const unsigned count = size * kThreads;
  blocks.assign(size, Block{});
  for (Block& block : blocks) {
    block.bytes.assign(sizeof(fave_fast::Shared) + kAligned, 0xff);
    block.meeting.size = kThreads;
    for (Meeting& meeting : block.warpgroups) meeting.size = kThreads / 2;
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
      threadIdx.x = current->number, blockIdx.x = user * size + current->block;
      swapcontext(&scheduler, &current->context);
    }
    if (all_done) return true;
  }
  return false;
}

}  // namespace

// A launch of clusters of `blocks`; threads take turns `stride` (an odd number) apart. Returns 0, or 1 where it
// hangs.
extern "C" int emulate(const fave_fast::EncoderCall* given, int blocks, unsigned stride) {
  call = given;
  for (int user = 0; user < given->users; ++user) {
    if (!encode(user, blocks, stride)) return 1;
  }
  return 0;
}

extern "C" int call_bytes() { return sizeof(fave_fast::EncoderCall); }

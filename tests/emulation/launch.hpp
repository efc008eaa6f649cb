#pragma once

// Launches of a kernel that was compiled with this folder's hopper.cuh.

#include <algorithm>
#include <vector>

#include "hopper.cuh"

namespace emulation {

struct Launch {
  int clusters, blocks;  // of a cluster
  int threads;           // of a block
  std::size_t bytes;     // of shared memory
  unsigned stride;       // threads take turns so far apart; odd
  void (*kernel)();
};

inline const Launch* running;

inline void run() {
  running->kernel();
  current->done = true;
  yield();
}

// One cluster; false where its threads wait for one another for ever. Shared memory is all ones (NaN) before.
inline bool run_cluster(int cluster) {
  static std::vector<Thread> threads;
  const Launch& launch = *running;
  const unsigned count = launch.blocks * launch.threads;
  blocks.assign(launch.blocks, Block{});
  for (Block& block : blocks) {
    block.bytes.assign(launch.bytes + kAligned, 0xff);
    block.meeting.size = launch.threads;
    block.warpgroups.assign(launch.threads / 128, Meeting{128});
    block.warps.assign(launch.threads / 32, Warp{});
    for (Warp& warp : block.warps) warp.meeting.size = 32;
  }
  arrived_at_cluster = 0;
  threads.resize(std::max<std::size_t>(threads.size(), count));
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.block = i / launch.threads, thread.number = i % launch.threads, thread.done = false;
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
      current = &threads[i * launch.stride % count];
      if (current->done) continue;
      all_done = false;
      threadIdx.x = current->number, blockIdx.x = cluster * launch.blocks + current->block;
      swapcontext(&scheduler, &current->context);
    }
    if (all_done) return true;
  }
  return false;
}

// False where it hangs.
inline bool run_all(const Launch& launch) {
  running = &launch;
  gridDim.x = launch.clusters * launch.blocks;
  for (int cluster = 0; cluster < launch.clusters; ++cluster) {
    if (!run_cluster(cluster)) return false;
  }
  return true;
}

}  // namespace emulation

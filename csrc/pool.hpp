// One pool of threads for everything here.
#pragma once

#include <atomic>
#include <functional>

namespace fave_fast {

// The threads that run one task together, numbered from 0.
class Team {
 public:
  explicit Team(int size) : size_(size) {}
  int size() const { return size_; }

  // Returns when all members have come here. They are on their way: it spins, and gives way after a while.
  void meet() {
    if (size_ == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      waiting_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    wait_for(round);
  }

 private:
  void wait_for(int round);

  const int size_;
  std::atomic<int> waiting_{0};
  std::atomic<int> round_{0};
};

using Task = std::function<void(Team& team, int member)>;

// Runs `task` on up to `threads` threads, the caller's among them, and returns when all are done. If another caller has
// the pool, the caller runs it alone: whatever is computed here does not depend on the number of threads. `task` throws
// nothing. Threads are started when first needed and then wait for work: 300 us spinning, then asleep. A child made by
// fork starts its own; the parent's threads hold no lock of its.
void run_on_team(int threads, const Task& task);

}  // namespace fave_fast

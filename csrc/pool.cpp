#include "pool.hpp"

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fave_fast {
namespace {

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

constexpr auto kSpin = std::chrono::microseconds(300);  // a request's next step, or the next request, follows within it
constexpr int kLooks = 64;      // between two looks at the clock
constexpr int kPatience = 4096;  // looks before a thread that must wait gives way

class Worker {
 public:
  explicit Worker(int member) : member_(member) { std::thread(&Worker::work, this).detach(); }

  void give(const Task& task, Team& team) {
    task_ = &task;
    team_ = &team;
    busy_.store(true);
    if (!asleep_.load()) return;
    const std::lock_guard<std::mutex> lock(mutex_);  // it is in `wait`, or has seen that it is busy
    wake_.notify_one();
  }

  bool done() const { return !busy_.load(std::memory_order_acquire); }

 private:
  void work() {
    for (;;) {
      wait();
      (*task_)(*team_, member_);
      busy_.store(false, std::memory_order_release);
    }
  }

  void wait() {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int look = 0; look < kLooks; ++look) {
        if (!done()) return;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.store(true);
    wake_.wait(lock, [this] { return busy_.load(); });
    asleep_.store(false);
  }

  const int member_;
  const Task* task_ = nullptr;
  Team* team_ = nullptr;
  std::atomic<bool> busy_{false}, asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  void run(int threads, const Task& task) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const int helpers = turn.owns_lock() ? start(threads - 1) : 0;
    Team team(helpers + 1);
    for (int i = 0; i < helpers; ++i) workers_[i]->give(task, team);
    task(team, 0);
    for (int i = 0; i < helpers; ++i) {
      for (int looks = 0; !workers_[i]->done(); ++looks) looks < kPatience ? relax() : std::this_thread::yield();
    }
  }

 private:
  // `wanted` workers, or as many as the system grants.
  int start(int wanted) {
    try {
      while (static_cast<int>(workers_.size()) < wanted) {
        workers_.push_back(std::make_unique<Worker>(static_cast<int>(workers_.size()) + 1));
      }
    } catch (const std::system_error&) {
      return static_cast<int>(workers_.size());
    }
    return wanted < 0 ? 0 : wanted;
  }

  std::mutex turn_;  // held by the caller whose task runs
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Never destroyed: its threads run until the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const bool made = [] {
    the_pool.store(new Pool);
#if defined(__unix__) || defined(__APPLE__)
    // The child of a fork has none of its parent's threads, and maybe a lock that one of them held.
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(new Pool); });
#endif
    return true;
  }();
  static_cast<void>(made);
  return *the_pool.load();
}

}  // namespace

void Team::wait_for(int round) {
  for (int looks = 0; round_.load(std::memory_order_acquire) == round; ++looks) {
    looks < kPatience ? relax() : std::this_thread::yield();
  }
}

void run_on_team(int threads, const Task& task) { pool().run(threads, task); }

}  // namespace fave_fast

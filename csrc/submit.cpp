#include "submit.hpp"

#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

namespace fave_fast {
namespace {

using Clock = std::chrono::steady_clock;

// What is used of the driver's interface (cuda.h is not needed to build this).
constexpr int kSuccess = 0;
constexpr int kNotReady = 600;

struct Driver {
  int (*graph_launch)(void*, void*);
  int (*stream_query)(void*);
  int (*stream_context)(void*, void**);
  int (*current_context)(void**);
  int (*set_context)(void*);
  int (*error_name)(int, const char**);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      throw std::runtime_error(std::string("NVIDIA's driver cannot be loaded: ") + dlerror());
    }
    find(library, "cuGraphLaunch", graph_launch);
    find(library, "cuStreamQuery", stream_query);
    find(library, "cuStreamGetCtx", stream_context);
    find(library, "cuCtxGetCurrent", current_context);
    find(library, "cuCtxSetCurrent", set_context);
    find(library, "cuGetErrorName", error_name);
  }

  template <typename Function>
  static void find(void* library, const char* name, Function*& function) {
    void* symbol = dlsym(library, name);
    if (symbol == nullptr) throw std::runtime_error(std::string("libcuda.so.1 has no ") + name);
    function = reinterpret_cast<Function*>(symbol);
  }

  void check(int result, const char* what) const {
    if (result == kSuccess) return;
    const char* name = nullptr;
    if (error_name(result, &name) != kSuccess || name == nullptr) name = "an unknown error";
    throw std::runtime_error(std::string(what) + ": " + name + " (" + std::to_string(result) + ")");
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

void* handle(std::uint64_t number) { return reinterpret_cast<void*>(static_cast<std::uintptr_t>(number)); }

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether work is left on `stream`; throws where it has failed.
bool busy(std::uint64_t stream) {
  const int result = driver().stream_query(handle(stream));
  if (result == kNotReady) return true;
  driver().check(result, "the stream failed while its graph was waited for");
  return false;
}

}  // namespace

void launch_graph(std::uint64_t graph, std::uint64_t stream) {
  const Driver& cuda = driver();
  void* context = nullptr;
  cuda.check(cuda.current_context(&context), "cuCtxGetCurrent");
  if (context == nullptr) {
    cuda.check(cuda.stream_context(handle(stream), &context), "cuStreamGetCtx");
    cuda.check(cuda.set_context(context), "cuCtxSetCurrent");
  }
  cuda.check(cuda.graph_launch(handle(graph), handle(stream)), "cuGraphLaunch");
}

void raise_flag(std::uint64_t flag, std::uint32_t value) {
  static_cast<std::atomic<std::uint32_t>*>(handle(flag))->store(value, std::memory_order_release);
}

bool wait_flag(std::uint64_t flag, std::uint32_t expected, std::uint64_t stream, double timeout_seconds) {
  static_assert(sizeof(std::atomic<std::uint32_t>) == 4 && std::atomic<std::uint32_t>::is_always_lock_free);
  const auto* word = static_cast<const std::atomic<std::uint32_t>*>(handle(flag));
  const auto reached = [&] { return word->load(std::memory_order_acquire) == expected; };
  // A request takes tens of microseconds; what takes longer than these has lost little by giving the core away.
  constexpr auto kPatience = std::chrono::microseconds(200);
  constexpr auto kQuery = std::chrono::milliseconds(1);
  const Clock::time_point start = Clock::now();
  Clock::time_point next_query = start + kQuery;
  for (;;) {
    for (int i = 0; i < 32; ++i) {
      if (reached()) return true;
      pause();
    }
    const Clock::time_point now = Clock::now();
    if (std::chrono::duration<double>(now - start).count() > timeout_seconds) return reached();
    if (now - start > kPatience) sched_yield();
    if (stream == 0 || now < next_query) continue;
    if (!busy(stream) && !reached()) {
      throw std::runtime_error("the stream is idle, and the flag is " + std::to_string(word->load()) + ", not " +
                               std::to_string(expected) + ": what was submitted does not raise it last");
    }
    next_query = Clock::now() + kQuery;
  }
}

bool answer(Line& line, std::uint64_t graph, double timeout_seconds, const RequestMemory& memory,
            const NumberedHistories& histories, bool exclude, float* scores, std::int64_t* best) {
  const auto give = [&] {
    const auto total = static_cast<std::int32_t>(histories.offsets[histories.users]);
    std::copy_n(histories.ids, total, memory.ids);
    for (std::int64_t i = 0; i <= memory.batch; ++i) {
      memory.offsets[i] = i < histories.users ? static_cast<std::int32_t>(histories.offsets[i]) : total;
    }
    if (exclude) {
      std::copy_n(memory.offsets, memory.batch + 1, memory.exclude_offsets);
    } else {
      std::fill_n(memory.exclude_offsets, memory.batch + 1, 0);
    }
  };
  const auto take = [&] {
    std::copy_n(memory.scores, histories.users * memory.k, scores);
    std::copy_n(memory.best, histories.users * memory.k, best);
  };
  return line.run(graph, timeout_seconds, give, take);
}

}  // namespace fave_fast

#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fave_fast {
namespace {

constexpr int kDevices = 64;  // for which it is remembered that a kernel may use its shared memory

void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA kernel: ") + what + ": " + cudaGetErrorString(result));
  }
}

// Another device than the thread's current one, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = before_ != device;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Grid {
  int clusters, blocks;  // of a cluster
  int threads, bytes;    // of a block, the bytes of shared memory
};

constexpr int kMostBytes = 227 << 10;  // of shared memory that a block may have

// Launches `kernel` on `stream` (cudaStream_t) of `device`; with `overlap` beside the end of the kernel before it.
template <auto kernel, typename Call>
void launch(const Call& call, const Grid& grid, bool overlap, int device, std::uint64_t stream) {
  static std::atomic<bool> prepared[kDevices];
  const OnDevice here(device);
  if (device >= kDevices || !prepared[device].load(std::memory_order_acquire)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes),
          "cudaFuncSetAttribute");
    if (device < kDevices) prepared[device].store(true, std::memory_order_release);
  }
  const auto blocks = static_cast<unsigned>(grid.blocks);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = blocks;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // see await_previous
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.clusters) * blocks);
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(grid.bytes);
  config.stream = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
  config.attrs = attributes;
  config.numAttrs = overlap ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, call), "launch");
}

}  // namespace
}  // namespace fave_fast

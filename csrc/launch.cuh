#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "gpu_encoders.hpp"

namespace fave_fast {
namespace {

constexpr int kDevices = 64;  // for which it is remembered that a kernel may use its shared memory

void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) {
    throw std::runtime_error(std::string("encoder: ") + what + ": " + cudaGetErrorString(result));
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

// Launches `kernel`, which uses kBytes of shared memory, as `clusters` of `blocks`.
template <int kBytes, void (*kernel)(EncoderCall)>
void launch(const EncoderCall& call, int clusters, int blocks, int threads, bool overlap, int device,
            std::uint64_t stream) {
  static_assert(kBytes <= 227 << 10, "a block has no more shared memory");
  static std::atomic<bool> prepared[kDevices];
  const OnDevice here(device);
  if (device >= kDevices || !prepared[device].load(std::memory_order_acquire)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "cudaFuncSetAttribute");
    if (device < kDevices) prepared[device].store(true, std::memory_order_release);
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(blocks);
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // see await_previous
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(clusters) * static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = kBytes;
  config.stream = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
  config.attrs = attributes;
  config.numAttrs = overlap ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, call), "launch");
}

}  // namespace
}  // namespace fave_fast

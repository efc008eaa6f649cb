#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cluster_encoder.cuh"

namespace fave_fast {
namespace {

constexpr int kDevices = 64;  // for which it is remembered that the kernel may use its shared memory

void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) {
    throw std::runtime_error(std::string("cluster encoder: ") + what + ": " + cudaGetErrorString(result));
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

template <int kOwn, bool kLayerNorm>
void launch(const ClusterEncoderCall& call, int tiles, bool overlap, int device, std::uint64_t stream) {
  constexpr int kBytes = sizeof(Shared<kOwn>);
  static_assert(kBytes <= 227 << 10, "a block has no more shared memory");
  static std::atomic<bool> prepared[kDevices];
  const OnDevice here(device);
  if (device >= kDevices || !prepared[device].load(std::memory_order_acquire)) {
    check(cudaFuncSetAttribute(encode_kernel<kOwn, kLayerNorm>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
          "cudaFuncSetAttribute");
    if (device < kDevices) prepared[device].store(true, std::memory_order_release);
  }
  const auto blocks = static_cast<unsigned>(2 * tiles / kOwn);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = blocks;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // see await_previous
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(call.users) * blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(stream));
  config.attrs = attributes;
  config.numAttrs = overlap ? 2 : 1;
  check(cudaLaunchKernelEx(&config, encode_kernel<kOwn, kLayerNorm>, call), "launch");
}

}  // namespace

void launch_cluster_encoder(const ClusterEncoderCall& call, int tiles, int own, bool overlap, int device,
                            std::uint64_t stream) {
  const auto run = call.layer_norm ? own == 1 ? launch<1, true> : launch<kTiles, true>
                                   : own == 1 ? launch<1, false> : launch<kTiles, false>;
  run(call, tiles, overlap, device, stream);
}

}  // namespace fave_fast

#pragma once

#include <cstdint>

namespace fave_fast {
namespace {

// Of whole numbers in 64 bits, if `wide`, or in 32.
__device__ __forceinline__ std::int64_t whole_number(const void* numbers, bool wide, std::int64_t at) {
  return wide ? static_cast<const std::int64_t*>(numbers)[at] : static_cast<const std::int32_t*>(numbers)[at];
}

}  // namespace
}  // namespace fave_fast

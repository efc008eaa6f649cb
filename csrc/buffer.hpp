// Memory at the start of a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fave_fast {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) : size_(size), data_(allocate(size)) {}

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  std::int64_t size() const { return size_; }

  // At least `size` elements; what they hold is lost when it grows.
  T* at_least(std::int64_t size) {
    if (size > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(allocate(size));
      size_ = size;
    }
    return data();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  static T* allocate(std::int64_t size) {
    return static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T), kAlignment));
  }

  std::int64_t size_ = 0;
  std::unique_ptr<T, Free> data_;
};

}  // namespace fave_fast

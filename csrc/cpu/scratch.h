// Memory for the time of one call, on whole pages.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstddef>
#include <cstdint>

namespace quantopt {

// At least `bytes`, as long as the object lives and no other of this `Use` is made on the same thread. A
// thread keeps what it needed up to kKept bytes: to have the pages of small products mapped anew at each call
// took a tenth of their time.
template <class Use>
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    const auto size = static_cast<size_t>(bytes) + kPage;
    if (size > kKept) {
      once_ = c10::GetCPUAllocator()->allocate(size);
      at_ = on_page(once_);
      return;
    }
    thread_local c10::DataPtr kept;
    thread_local size_t kept_size = 0;
    if (size > kept_size) {
      kept = c10::GetCPUAllocator()->allocate(size);
      kept_size = size;
    }
    at_ = on_page(kept);
  }

  char* get() const { return at_; }

 private:
  static constexpr size_t kKept = (8 << 20) + (1 << 16), kPage = 4096;
  static char* on_page(const c10::DataPtr& memory) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return reinterpret_cast<char*>((address + kPage - 1) / kPage * kPage);
  }

  c10::DataPtr once_;
  char* at_;
};

}  // namespace quantopt

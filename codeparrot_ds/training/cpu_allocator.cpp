// Counts host memory held by PyTorch tensors, as torch.cuda.max_memory_allocated does for a GPU.
// PyTorch's profiler cannot, because it misses memory freed by gloo's threads.
#include <c10/core/CPUAllocator.h>

#include <atomic>

namespace {

std::atomic<int64_t> held{0};
std::atomic<int64_t> most{0};
c10::Allocator* theirs = nullptr;

// Precedes each allocated block and preserves its alignment.
struct alignas(64) Header {
  void* context;  // of the original allocator, which `free` releases
  c10::DeleterFnPtr free;
  int64_t bytes;
};

void release(void* pointer) {
  if (pointer == nullptr) {
    return;
  }
  const Header header = static_cast<Header*>(pointer)[-1];
  held -= header.bytes;
  header.free(header.context);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) {
      return {nullptr, nullptr, &release, cpu};
    }
    c10::DataPtr data = theirs->allocate(sizeof(Header) + bytes);
    const int64_t now = held += static_cast<int64_t>(bytes);
    int64_t before = most.load();
    while (before < now && !most.compare_exchange_weak(before, now)) {
    }
    auto* header = static_cast<Header*>(data.get());
    const auto free = data.get_deleter();
    *header = Header{data.release_context(), free, static_cast<int64_t>(bytes)};
    return {header + 1, header + 1, &release, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

CountingAllocator ours;

}  // namespace

extern "C" {

void start() {
  if (theirs == nullptr) {
    theirs = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&ours, 255);
  }
}

int64_t held_bytes() { return held; }

int64_t peak_bytes() { return most; }

void reset_peak() { most = held.load(); }

}

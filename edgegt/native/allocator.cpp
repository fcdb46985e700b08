/* Memory of torch's large tensors on the CPU, used again instead of given back and asked for anew.

   Freed memory leaves the process (see edgegt/process.py), which keeps peaks small and predictable; but each new tensor
   then costs page faults, as much time as the arithmetic on it. A step makes tensors of few sizes that come again in
   every layer, so a freed block waits here for the next tensor of its size. Never more is held than was in use at
   once: before that would be so, everything that is free leaves the process. */

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t kSmallest = size_t{1} << 18;  // what is smaller stays on the heap
constexpr size_t kPage = size_t{1} << 12;
constexpr size_t kHuge = size_t{1} << 21;

struct Blocks {
    std::mutex mutex;
    std::unordered_map<size_t, std::vector<void*>> free;
    std::unordered_map<void*, size_t> lent;
    size_t held = 0, used = 0, most = 0;

    void drop() {
        for (auto& [size, blocks] : free)
            for (void* block : blocks) {
                munmap(block, size);
                held -= size;
            }
        free.clear();
    }

    void* take(size_t count) {
        const size_t size = (count + kPage - 1) / kPage * kPage;
        const std::lock_guard<std::mutex> guard(mutex);
        void* block = nullptr;
        auto found = free.find(size);
        if (found != free.end() && !found->second.empty()) {
            block = found->second.back();
            found->second.pop_back();
        } else {
            if (held + size > std::max(most, used + size)) drop();
            block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (block == MAP_FAILED) {
                drop();
                block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            }
            TORCH_CHECK(block != MAP_FAILED, "not enough memory for ", size, " bytes");
#ifdef MADV_HUGEPAGE
            if (size >= kHuge) madvise(block, size, MADV_HUGEPAGE);
#endif
            held += size;
        }
        lent[block] = size;
        used += size;
        most = std::max(most, used);
        return block;
    }

    bool give(void* block) {
        const std::lock_guard<std::mutex> guard(mutex);
        auto found = lent.find(block);
        if (found == lent.end()) return false;
        const size_t size = found->second;
        lent.erase(found);
        used -= size;
        free[size].push_back(block);
        return true;
    }
};

Blocks& blocks() {
    static auto* all = new Blocks;  // outlives every tensor
    return *all;
}

c10::Allocator* small = nullptr;

// Of both kinds, since oneDNN (GELU, say) asks for raw memory and gives it back by its address alone.
void give_back(void* block) {
    const bool may_be_ours = reinterpret_cast<uintptr_t>(block) % kPage == 0;
    if (!may_be_ours || !blocks().give(block)) small->raw_deallocate(block);
}

struct Allocator final : c10::Allocator {
    c10::DataPtr allocate(size_t count) override {
        void* block = count < kSmallest ? small->raw_allocate(count) : blocks().take(count);
        return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

    void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};

}  // namespace

extern "C" {

/* Take over large allocations from now on. */
__attribute__((visibility("default"))) void install() {
    static auto* ours = new Allocator;
    if (small == nullptr) {
        small = c10::GetCPUAllocator();
        c10::SetCPUAllocator(ours, 100);
    }
}

/* Between phases, after which other sizes will be wanted: what is free leaves the process. */
__attribute__((visibility("default"))) void trim() {
    const std::lock_guard<std::mutex> guard(blocks().mutex);
    blocks().drop();
    blocks().most = blocks().used;
}

/* Bytes: 0 held, 1 in use, 2 most in use since the last trim. */
__attribute__((visibility("default"))) int64_t state(int what) {
    const std::lock_guard<std::mutex> guard(blocks().mutex);
    return static_cast<int64_t>(what == 0 ? blocks().held : what == 1 ? blocks().used : blocks().most);
}
}

/* Memory of torch's large tensors on the CPU, used again instead of given back and asked for anew.

   Freed memory leaves the process (see edgegt/process.py), which keeps peaks small and predictable; but each new tensor
   then costs page faults, as much time as the arithmetic on it. So freed memory waits here for the next tensor: the
   smallest free range that holds it is split, and neighbours that are free become one. Never more is held than was in
   use at once: before that would be so, other free memory leaves the process, the largest range of it as part of the
   new one where the kernel can give a range another size. */

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t kSmallest = size_t{1} << 18;  // what is smaller stays on the heap
constexpr size_t kPage = size_t{1} << 12;
constexpr size_t kHuge = size_t{1} << 21;

struct Blocks {
    std::mutex mutex;
    std::map<char*, size_t> free;                    // ranges by address, no two of them side by side
    std::set<std::pair<size_t, char*>> by_size;      // the same
    std::unordered_map<void*, size_t> lent;
    size_t held = 0, used = 0, most = 0;

    void put(char* start, size_t size) {
        free.emplace(start, size);
        by_size.emplace(size, start);
    }

    void remove(char* start, size_t size) {
        free.erase(start);
        by_size.erase({size, start});
    }

    void drop() {
        for (auto& [start, size] : free) {
            munmap(start, size);
            held -= size;
        }
        free.clear();
        by_size.clear();
    }

    // A free range of at least this size, the rest of which stays free; null when there is none.
    char* fitting(size_t size) {
        auto found = by_size.lower_bound({size, nullptr});
        if (found == by_size.end()) return nullptr;
        auto [whole, start] = *found;
        remove(start, whole);
        if (whole > size) put(start + size, whole - size);
        return start;
    }

    // New memory; no free range is as large. What is held stays within its bound.
    char* fresh(size_t size) {
        const size_t bound = std::max(most, used + size);
        char* grown = nullptr;
        size_t before = 0;
        if (held + size > bound) {
            std::tie(before, grown) = *by_size.rbegin();
            remove(grown, before);
            held -= before;
        }
        while (held + size > bound) {
            auto [largest, start] = *by_size.rbegin();
            const size_t gone = std::min(largest, held + size - bound);
            remove(start, largest);
            munmap(start + largest - gone, gone);
            held -= gone;
            if (largest > gone) put(start, largest - gone);
        }
        void* block = MAP_FAILED;
#ifdef MREMAP_MAYMOVE
        if (grown != nullptr) block = mremap(grown, before, size, MREMAP_MAYMOVE);
#endif
        if (block == MAP_FAILED) {
            if (grown != nullptr) munmap(grown, before);
            block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        }
        if (block == MAP_FAILED) {
            drop();
            block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        }
        TORCH_CHECK(block != MAP_FAILED, "not enough memory for ", size, " bytes");
#ifdef MADV_HUGEPAGE
        if (size >= kHuge) madvise(block, size, MADV_HUGEPAGE);
#endif
        held += size;
        return static_cast<char*>(block);
    }

    void* take(size_t count) {
        const size_t size = (count + kPage - 1) / kPage * kPage;
        const std::lock_guard<std::mutex> guard(mutex);
        char* block = fitting(size);
        if (block == nullptr) block = fresh(size);
        lent[block] = size;
        used += size;
        most = std::max(most, used);
        return block;
    }

    bool give(void* block) {
        const std::lock_guard<std::mutex> guard(mutex);
        auto found = lent.find(block);
        if (found == lent.end()) return false;
        char* start = static_cast<char*>(block);
        size_t size = found->second;
        lent.erase(found);
        used -= size;
        auto next = free.lower_bound(start);
        if (next != free.end() && start + size == next->first) {
            const size_t more = next->second;
            remove(start + size, more);
            size += more;
        }
        next = free.lower_bound(start);
        if (next != free.begin()) {
            auto [earlier, more] = *std::prev(next);
            if (earlier + more == start) {
                remove(earlier, more);
                start = earlier;
                size += more;
            }
        }
        put(start, size);
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

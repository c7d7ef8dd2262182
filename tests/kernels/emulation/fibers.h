// Runs a CUDA kernel on a CPU, one program (block of threads) after the other: a fiber for each
// thread, which runs until it waits for others. What the hardware leaves open is done in the way
// that shows a mistake: a warp runs as far as it can before the next one starts, in an order that
// the caller chooses; shared memory starts as NaN; copies land as late as the waits allow.
//
// One launch at a time. A fault ends the launch; its message is for the caller.

// No header of C++ but the smallest: each kernel is compiled with them.
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <utility>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct uint3 {
  unsigned x, y, z;
};
typedef uint3 dim3;
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace emulation {

constexpr int kLanes = 32, kMostThreads = 1024, kMostCopies = 512, kMostRanges = 32;
constexpr size_t kStack = 256 << 10;
// Shared memory starts where it is aligned to no more than SHARED_MEMORY promises.
constexpr u32 kSharedBase = 1152, kMostShared = 228 << 10, kGuard = 1024;
enum Order { kForward, kReversed, kRotated };

struct Copy {
  const void* from;  // null: zeros
  u32 to;
  int group;
};
// Waits while `*waits` is `seen`. `copies` is a ring, from `landed` to `issued`; `group` is the one
// that is not committed yet.
struct Fiber {
  jmp_buf place;
  ucontext_t beginning;
  bool begun, done;
  const int* waits;
  int seen;
  Copy copies[kMostCopies];
  int landed, issued, group;
};
struct Meeting {
  int arrived, generation;
};
// What the lanes of a warp hand to an instruction of the whole warp.
struct Lane {
  u32 at, word, mask, result;
  u32* words;
  float* sums;
  u32 a[4], b[2];
};
// A tensor among the arguments.
struct Range {
  const char *low, *high;
  bool loaded, stored;
};

alignas(4096) static char shared_memory[kSharedBase + kMostShared + kGuard];
static Fiber fibers[kMostThreads];
static Lane lanes[kMostThreads];
static Meeting warps[kMostThreads / kLanes], block;
// Which places of 16 bytes a copy is on its way to.
static bool on_the_way[kMostShared / 16];
static jmp_buf scheduler;
static char* stacks;
static void (*entry)(void*);
static void* entry_data;
static int threads, order;
// What other headers add: a program begins; something lands that no thread waits for by name, and
// whether anything did. It is asked for when no thread gets any further.
static void (*begin_hook)();
static bool (*land_hook)();
static u32 shared_bytes;
static Range ranges[kMostRanges];
static int range_count;
static bool all_ranges_known;
static u64 conflicts;
static char message[512];

__attribute__((noinline)) static void yield() {
  Fiber& f = fibers[threadIdx.x];
  if (!_setjmp(f.place)) _longjmp(scheduler, 1);
}

__attribute__((noinline, format(printf, 1, 2))) static void fault(const char* text, ...) {
  const int n = snprintf(message, sizeof message, "program (%u, %u, %u), thread %u: ", blockIdx.x,
                         blockIdx.y, blockIdx.z, threadIdx.x);
  va_list rest;
  va_start(rest, text);
  vsnprintf(message + n, sizeof message - n, text, rest);
  va_end(rest);
  while (true) yield();  // never resumed
}

// Until `count` threads are here; the last one does `work`.
template <class F>
inline void meet(Meeting& m, int count, F work) {
  if (++m.arrived == count) {
    work();
    m.arrived = 0;
    ++m.generation;
    return;
  }
  Fiber& f = fibers[threadIdx.x];
  f.waits = &m.generation;
  f.seen = m.generation;
  yield();
  f.waits = nullptr;
}

// An instruction of the whole warp; `work` gets the number of its first thread.
template <class F>
inline void whole_warp(F work) {
  const int warp = threadIdx.x / kLanes;
  meet(warps[warp], kLanes, [=] { work(warp * kLanes); });
}

inline Lane& mine() { return lanes[threadIdx.x]; }

inline char* shared_at(u32 at, int bytes) {
  if (at % bytes) fault("address %u of shared memory, which is no multiple of %d", at, bytes);
  if (at < kSharedBase || at + bytes > kSharedBase + shared_bytes)
    fault("byte %d of %u of shared memory", (int)(at - kSharedBase), shared_bytes);
  return shared_memory + at;
}

// `p`, if `bytes` there are aligned and in a tensor among the arguments.
inline const char* global_at(const void* p, int bytes, bool stores) {
  const char* at = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(at) % bytes) fault("%p, which is no multiple of %d", p, bytes);
  bool inside = !all_ranges_known;
  for (int i = 0; i < range_count; ++i) {
    Range& r = ranges[i];
    if (at < r.low || at + bytes > r.high) continue;
    inside = true;
    (stores ? r.stored : r.loaded) = true;
    if (r.loaded && r.stored)
      fault("load_global reads a tensor that the same kernel writes, which its cache does not see");
  }
  if (!inside) {
    for (int i = 0; i < range_count; ++i) {
      const Range& r = ranges[i];
      if (at >= r.low - 65536 && at < r.high + 65536)
        fault("byte %ld of a tensor of %ld", (long)(at - r.low), (long)(r.high - r.low));
    }
    fault("%p, which is in no tensor among the arguments", p);
  }
  return at;
}

inline void issue(u32 to, const void* from) {
  Fiber& f = fibers[threadIdx.x];
  if (f.issued - f.landed == kMostCopies)
    fault("more than %d copies that have not landed", kMostCopies);
  bool& taken = on_the_way[(to - kSharedBase) / 16];
  if (taken) fault("two copies at once to byte %d of shared memory", (int)(to - kSharedBase));
  taken = true;
  f.copies[f.issued++ % kMostCopies] = {from, to, f.group};
}

// The copies of this thread in groups up to `group`.
inline void land(int group) {
  Fiber& f = fibers[threadIdx.x];
  for (; f.landed < f.issued; ++f.landed) {
    const Copy& c = f.copies[f.landed % kMostCopies];
    if (c.group > group) return;
    on_the_way[(c.to - kSharedBase) / 16] = false;
    if (c.from)
      memcpy(shared_memory + c.to, c.from, 16);
    else
      memset(shared_memory + c.to, 0, 16);
  }
}

inline int place(int i, int n) {
  return order == kForward ? i : order == kReversed ? n - 1 - i : (i + (n + 1) / 2) % n;
}

static void fiber_main() {
  while (true) {  // once for each program
    entry(entry_data);
    fibers[threadIdx.x].done = true;
    yield();
  }
}

__attribute__((noinline)) static void resume(int thread) {
  Fiber& f = fibers[thread];
  threadIdx.x = thread;
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.place, 1);
  f.begun = true;
  getcontext(&f.beginning);
  f.beginning.uc_stack.ss_sp = stacks + thread * kStack;
  f.beginning.uc_stack.ss_size = kStack;
  f.beginning.uc_link = nullptr;
  makecontext(&f.beginning, fiber_main, 0);
  setcontext(&f.beginning);
}

inline bool ready(const Fiber& f) { return !f.done && (!f.waits || *f.waits != f.seen); }

// Whether the lanes of `warp` got any further.
static bool run_warp(int warp) {
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (int i = 0; i < kLanes; ++i) {
      const int thread = warp * kLanes + place(i, kLanes);
      if (!ready(fibers[thread])) continue;
      resume(thread);
      if (message[0]) return false;
      again = moved = true;
    }
  }
  return moved;
}

static void run_program() {
  memset(shared_memory, 0xff, kSharedBase + shared_bytes + kGuard);
  memset(on_the_way, 0, sizeof on_the_way);
  for (int t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    f.done = false;
    f.waits = nullptr;
    f.landed = f.issued = f.group = 0;
  }
  const int count = threads / kLanes;
  memset(warps, 0, sizeof warps);
  block = {};
  if (begin_hook) begin_hook();
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < count; ++i) {
      moved |= run_warp(place(i, count));
      if (message[0]) return;
    }
    if (!moved && land_hook) {
      moved = land_hook();
      if (message[0]) return;
    }
  }
  for (int t = 0; t < threads; ++t) {
    if (fibers[t].done) continue;
    const int *waits = fibers[t].waits, *first = &warps[0].generation;
    const bool of_block = waits == &block.generation;
    const bool of_warp = waits >= first && waits <= first + sizeof warps / sizeof(int);
    snprintf(message, sizeof message, "program (%u, %u, %u): thread %d waits for ever%s",
             blockIdx.x, blockIdx.y, blockIdx.z, t,
             of_block ? " at __syncthreads" : of_warp ? " for lanes of its warp" : " at a barrier");
    return;
  }
  const u32 end = kSharedBase + shared_bytes;
  for (u32 i = end; i < end + kGuard; ++i) {
    if (shared_memory[i] != '\xff') {
      snprintf(message, sizeof message, "program (%u, %u, %u) wrote byte %d of %u of shared memory",
               blockIdx.x, blockIdx.y, blockIdx.z, (int)(i - kSharedBase), shared_bytes);
      return;
    }
  }
}

// What a test gives, see emulate.py: the same fields in the same order.
struct Launch {
  u32 grid[3];
  int threads;
  u32 shared_bytes;
  int order;
  int arguments;
  void** pointers;
  const int* sizes;
  int ranges;
  const char* const* lows;
  const u64* lengths;
  int all_ranges_known;
};

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** pointers, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(pointers[I])...);
}

// Null, or what went wrong.
template <class... A>
static const char* run(void (*kernel)(A...), const Launch& launch) {
  static void (*same)(A...);
  same = kernel;
  message[0] = 0;
  const int sizes[] = {(int)sizeof(A)..., 0};
  bool fits = launch.arguments == sizeof...(A);
  for (int i = 0; fits && i < launch.arguments; ++i) fits = sizes[i] == launch.sizes[i];
  if (!fits) return "the arguments are not those of the kernel";
  if (launch.threads % kLanes || launch.threads > kMostThreads)
    return "the number of threads is no multiple of 32, or above 1024";
  if (launch.shared_bytes > kMostShared) return "too much shared memory";
  if (launch.ranges > kMostRanges) return "too many tensors";
  if (!stacks)
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stacks == MAP_FAILED) return "no memory for the stacks";
  entry = [](void* p) {
    call(same, static_cast<void**>(p), std::index_sequence_for<A...>());
  };
  entry_data = launch.pointers;
  threads = launch.threads;
  shared_bytes = launch.shared_bytes;
  order = launch.order;
  conflicts = 0;
  all_ranges_known = launch.all_ranges_known;
  range_count = launch.ranges;
  for (int i = 0; i < launch.ranges; ++i)
    ranges[i] = {launch.lows[i], launch.lows[i] + launch.lengths[i], false, false};
  blockDim = {(u32)threads, 1, 1};
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  const int programs = gridDim.x * gridDim.y * gridDim.z;
  for (int i = 0; i < programs && !message[0]; ++i) {
    const u32 p = place(i, programs);
    blockIdx = {p % gridDim.x, p / gridDim.x % gridDim.y, p / gridDim.x / gridDim.y};
    run_program();
  }
  if (!message[0]) return nullptr;
  for (Fiber& f : fibers) f.begun = false;  // where they stopped is of no use any more
  return message;
}

}  // namespace emulation

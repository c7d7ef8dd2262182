// The names of wan_vae/kernels/cuda/hopper.cuh for a CPU. Stands behind machine.h and a kernel's macros,
// in front of its source, in the place of hopper.cuh.
//
// What the hardware leaves open is done in the way that shows a mistake: a copy to shared memory lands
// when no thread gets any further without it, and tensor cores read their operands and write their
// sums when a thread waits for them. A barrier that gets too many arrivals ends the launch.

// The kernels for Hopper say so by another name than those of machine.cuh.
#undef SHARED_MEMORY
#define SHARED_MEMORY(name) char* const name = emulation::shared_memory + emulation::kSharedBase
#define __grid_constant__

struct TensorMap {
  char bytes[128];
};

inline u32 __shfl_xor_sync(u32, u32 word, int mask) { return shuffle_xor(word, mask); }

namespace emulation {

constexpr int kMostBulk = 256, kMostProducts = 64;

// See emulate.py.
struct Frames {
  const char* address;
  int n, h, w, c, rows, columns, channels;
};
struct Barrier {
  int arrivals, missing, bytes, phase;  // phase: how many are over
};
// A copy of a box of frames, or of `bytes` from `from`.
struct Bulk {
  u32 to, barrier, bytes;
  const char* from;
  Frames frames;
  int channel, x, y, frame;
};
// d += a * b. group: as wgmma commits them.
struct Product {
  float* d;
  u64 a, b;
  bool add;
  int group;
};
struct Products {
  Product waiting[kMostProducts];
  int count, group;
};

static Barrier barriers[sizeof shared_memory / 8];
static Bulk bulk[kMostBulk];
static int bulk_count;
static Products queued[kMostThreads];

inline Barrier& barrier_at(u32 at) {
  shared_at(at, 8);
  Barrier& b = barriers[at / 8];
  if (!b.arrivals) fault("no barrier at byte %u of shared memory", at - kSharedBase);
  return b;
}

// Whether all threads of the program are done: nothing may come to it any more.
inline bool ended() {
  for (int t = 0; t < threads; ++t)
    if (!fibers[t].done) return false;
  return true;
}

inline void turn(Barrier& b) {
  if (b.missing || b.bytes) return;
  b.missing = b.arrivals;
  ++b.phase;
}

inline void arrive(u32 at, int bytes) {
  Barrier& b = barrier_at(at);
  if (!b.missing) fault("too many arrivals at a barrier");
  --b.missing;
  b.bytes += bytes;
  turn(b);
}

inline void wait(u32 at, u32 parity) {
  Barrier& b = barrier_at(at);
  while ((b.phase & 1) == (int)parity) {
    Fiber& f = fibers[threadIdx.x];
    f.waits = &b.phase;
    f.seen = b.phase;
    yield();
    f.waits = nullptr;
  }
}

inline void issue(const Bulk& b) {
  if (bulk_count == kMostBulk) fault("more than %d copies that have not landed", kMostBulk);
  shared_at(b.to, 16);
  shared_at(b.to + b.bytes - 16, 16);
  barrier_at(b.barrier);
  bulk[bulk_count++] = b;
}

// The hardware's 64-byte swizzle of an address.
inline u32 swizzled(u32 at) { return at ^ (at >> 7 & 3) << 4; }

inline void land(const Bulk& b) {
  if (b.from) {
    for (u32 i = 0; i < b.bytes; i += 16) memcpy(shared_at(b.to + i, 16), b.from + i, 16);
  } else {
    const Frames& f = b.frames;
    for (u32 i = 0; i < b.bytes; i += 16) {
      const int pixel = i / (f.channels * 2), c = b.channel + i % (f.channels * 2) / 2;
      const int x = b.x + pixel % f.columns, y = b.y + pixel / f.columns;
      const bool inside = (u32)x < (u32)f.w && (u32)y < (u32)f.h && (u32)b.frame < (u32)f.n &&
                          (u32)c < (u32)f.c;
      char* const to = shared_at(swizzled(b.to + i), 16);
      if (inside)
        memcpy(to, f.address + ((((u64)b.frame * f.h + y) * f.w + x) * f.c + c) * 2, 16);
      else
        memset(to, 0, 16);
    }
  }
  Barrier& at = barrier_at(b.barrier);
  at.bytes -= b.bytes;
  turn(at);
}

static bool land_one() {
  if (!bulk_count) return false;
  const int i = place(0, bulk_count);
  const Bulk landed = bulk[i];
  bulk[i] = bulk[--bulk_count];
  if (ended())
    snprintf(message, sizeof message, "a copy to a program that has ended");
  else
    land(landed);
  return true;
}

static void begin() {
  bulk_count = 0;
  memset(barriers, 0, sizeof barriers);
  memset(queued, 0, sizeof queued);
}

inline float operand(u32 at) {
  u16 v;
  memcpy(&v, shared_at(swizzled(at), 2), 2);
  return wide<BF16_IN ? Type::bf16 : Type::half>(v);
}

// What this thread has of 64 x BN x 16 products.
inline void multiply(const Product& p) {
  const int warp = threadIdx.x / kLanes % 4, lane = threadIdx.x % kLanes;
  const u32 a = (u32)p.a << 4, a_stride = p.a >> 32, b = (u32)p.b << 4, b_stride = p.b >> 32;
  float rows[2][16];
  for (int i = 0; i < 2; ++i) {
    const int m = 16 * warp + 8 * i + lane / 4;
    for (int k = 0; k < 16; ++k) rows[i][k] = operand(a + m / 8 * a_stride + m % 8 * 64 + k * 2);
  }
  for (int j = 0; j < BN / 4; ++j) {
    const int n = j / 2 * 8 + lane % 4 * 2 + j % 2;
    float column[16];
    for (int k = 0; k < 16; ++k) column[k] = operand(b + n / 8 * b_stride + n % 8 * 64 + k * 2);
    for (int i = 0; i < 2; ++i) {
      float& d = p.d[j / 2 * 4 + i * 2 + j % 2];
      float sum = p.add ? d : 0;
      for (int k = 0; k < 16; ++k) sum += rows[i][k] * column[k];
      d = sum;
    }
  }
}

static const bool hooked = (begin_hook = begin, land_hook = land_one, true);

}  // namespace emulation

template <int N>
inline void give_registers() {}
template <int N>
inline void take_registers() {}

inline u32 load_shared_word(u32 at) {
  u32 word;
  memcpy(&word, emulation::shared_at(at, 4), 4);
  return word;
}

// -- barriers --------------------------------------------------------------------------------------

inline void barrier_init(u32 barrier, u32 arrivals) {
  emulation::shared_at(barrier, 8);
  emulation::barriers[barrier / 8] = {(int)arrivals, (int)arrivals, 0, 0};
}
inline void barriers_exist() {}
inline void barrier_expect(u32 barrier, u32 bytes) { emulation::arrive(barrier, bytes); }
inline void barrier_arrive(u32 barrier) { emulation::arrive(barrier, 0); }
inline void barrier_wait(u32 barrier, u32 parity) { emulation::wait(barrier, parity); }

// -- copies ----------------------------------------------------------------------------------------

inline void load_tile(u32 to, const TensorMap* map, u32 barrier, int channel, int x, int y,
                      int frame) {
  emulation::Frames f;
  memcpy(&f, map, sizeof f);
  const u32 bytes = f.rows * f.columns * f.channels * 2;
  emulation::issue({to, barrier, bytes, nullptr, f, channel, x, y, frame});
}
inline void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
  emulation::issue({to, barrier, bytes, static_cast<const char*>(from), {}, 0, 0, 0, 0});
}

// -- tensor cores ----------------------------------------------------------------------------------

inline u64 descriptor(u32 address, u32 stride) { return (u64)stride << 32 | address >> 4; }
inline void wgmma_fence() {}
inline void wgmma_commit() { ++emulation::queued[threadIdx.x].group; }
template <int N>
inline void wgmma_wait() {
  emulation::Products& p = emulation::queued[threadIdx.x];
  int left = 0;
  for (int i = 0; i < p.count; ++i) {
    if (p.waiting[i].group < p.group - N) emulation::multiply(p.waiting[i]);
    else p.waiting[left++] = p.waiting[i];
  }
  p.count = left;
}
inline void wgmma(float (&d)[BN / 2], u64 a, u64 b, int add) {
  emulation::Products& p = emulation::queued[threadIdx.x];
  if (p.count == emulation::kMostProducts) emulation::fault("too many products at once");
  p.waiting[p.count++] = {d, a, b, add != 0, p.group};
}

inline u32 pack(float low, float high) { return pack<BF16_OUT ? Type::bf16 : Type::half>(low, high); }
inline void unpack(u32 word, float& low, float& high) {
  unpack<BF16_OUT ? Type::bf16 : Type::half>(word, low, high);
}

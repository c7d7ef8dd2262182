// Attention of one wide head, softmax(q k^T) v, for every NVIDIA card from Turing on: tensor cores by
// mma.sync, keys and values by cp.async, at most 99 KiB of shared memory.
//
// A program has M queries and passes once over the keys, KEYS at a time, with a running maximum and
// sum of each query. Its queries stand in shared memory; keys and values go through a ring of
// STAGES slices of 8 KiB: KEYS keys x kKeyChannels channels, then 32 values x 128 channels. A warp
// makes the scores of MI * 16 queries x 16 keys, and of the result MI * 16 queries x 16 of each 128
// / WARPS_N channels; probabilities go from warp to warp through shared memory. Scores, maxima,
// sums and results are float32, probabilities float16.
//
// A query's sums run over the channels, and over the keys, in an order that depends on neither its
// place among the M nor the other queries: a block's partial sums stay with the lanes that hold its
// keys (columns of the scores), and are added across lanes, then warps, at the end.
// Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018); Dao et al.,
// FlashAttention (2022).
//
// Macros: CHANNELS, a multiple of 8; MI, WARPS_M, WARPS_N, STAGES.

typedef long long i64;

constexpr int kThreads = 32 * WARPS_M * WARPS_N;
constexpr int M = 16 * MI * WARPS_M, KEYS = 16 * WARPS_N;
constexpr int kValueChannels = 128, kValues = 32;
constexpr int kSlice = kValues * kValueChannels * 2;
constexpr int kKeyChannels = kSlice / 2 / KEYS;
// Channels with zeros up to whole slices.
constexpr int kFilled = (CHANNELS + kValueChannels - 1) / kValueChannels * kValueChannels;
constexpr int kKeySlices = kFilled / kKeyChannels;
constexpr int kParts = kFilled / kValueChannels;  // of the channels of the result
constexpr int kValueSlices = KEYS / kValues * kParts;
constexpr int NI = kValueChannels / WARPS_N / 8;  // tiles of 8 channels of a warp and part

constexpr int kWeightsAt = M * kFilled * 2;
constexpr int kRowsAt = kWeightsAt + M * KEYS * 2;
constexpr int kRingAt = kRowsAt + M * WARPS_N * 4;
constexpr int kSharedBytes = kRingAt + STAGES * kSlice;
static_assert(kSharedBytes <= 101376, "99 KiB");
static_assert(kSlice % (kThreads * 16) == 0, "turns of all threads");
static_assert(CHANNELS % 8 == 0 && NI % 2 == 0 && KEYS % kValues == 0 && STAGES >= 2, "");

// Byte of the 16-byte word `word` of a row, in a matrix with WORDS of them a row: such that
// ldmatrix reads eight rows at once.
template <int WORDS>
INLINE u32 place(int row, int word) {
  constexpr int kSpan = WORDS % 8 == 0 ? 8 : WORDS % 4 == 0 ? 4 : 2;
  static_assert(WORDS % 2 == 0, "");
  return (row * WORDS + (word ^ (row * kSpan / 8 % kSpan))) * 16;
}

// Rows of CHANNELS numbers, `step` words of 16 bytes after each other; `count` of them.
struct Rows {
  const char* first;
  int step, count;

  INLINE Rows(const void* base, int frame_step, int step, int count)
      : first(static_cast<const char*>(base) + static_cast<i64>(blockIdx.y) * frame_step * 16),
        step(step),
        count(count) {}

  // Zeros beyond the last row and channel.
  INLINE void load(u32 to, int row, int word) const {
    const bool inside = row < count && (kFilled == CHANNELS || word < CHANNELS / 8);
    cp_async(to, first + (static_cast<i64>(row) * step + word) * 16, inside);
  }
};

// The ring: slice after slice of each block of keys, first its keys, then its values. It has no
// branches, so that the copies stand between products.
struct Ring {
  const Rows k, v;
  const u32 base;
  const int tid;
  int key, slice, filled, read;  // the next slice to load; bytes into the ring

  INLINE Ring(const Rows& k, const Rows& v, u32 base, int tid)
      : k(k), v(v), base(base), tid(tid), key(0), slice(0), filled(0), read(0) {}

  // Beyond the last slice: zeros, which nobody reads.
  INLINE void load() {
    constexpr int kKeyWords = kKeyChannels / 8, kValueWords = kValueChannels / 8;
    const bool is_key = slice < kKeySlices;
    const int part = slice - kKeySlices;
    const Rows from(is_key ? k : v);
    const int row = key + (is_key ? tid / kKeyWords : part / kParts * kValues + tid / kValueWords);
    const int word = is_key ? slice * kKeyWords + tid % kKeyWords
                            : part % kParts * kValueWords + tid % kValueWords;
    const u32 to = base + filled + (is_key ? place<kKeyWords>(tid / kKeyWords, tid % kKeyWords)
                                           : place<kValueWords>(tid / kValueWords, tid % kValueWords));
#pragma unroll
    for (int turn = 0; turn < kSlice / 16 / kThreads; ++turn) {
      // A turn has a multiple of eight rows: their words are in the same places.
      const int rows = turn * (is_key ? kThreads / kKeyWords : kThreads / kValueWords);
      from.load(to + turn * kThreads * 16, row + rows, word);
    }
    cp_commit();
    slice = slice + 1 < kKeySlices + kValueSlices ? slice + 1 : 0;
    key += slice ? 0 : KEYS;
    filled = filled + kSlice < STAGES * kSlice ? filled + kSlice : 0;
  }

  // Waits for the next slice. From here on `load` may put another over the one that was read before.
  INLINE u32 next() {
    cp_wait<STAGES - 2>();
    __syncthreads();
    const u32 at = base + read;
    read = read + kSlice < STAGES * kSlice ? read + kSlice : 0;
    return at;
  }
};

// q: [frames, queries, CHANNELS]; k, v: [frames, keys, CHANNELS]; steps in words of 16 bytes.
// out: [frames, queries, CHANNELS], dense. `scale` has log2(e) in it.
// Grid: (blocks of M queries, frames).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
attention(const void* RESTRICT q, const void* RESTRICT k, const void* RESTRICT v,
          u16* RESTRICT out, int queries, int keys, int q_frame, int q_row, int k_frame, int k_row,
          int v_frame, int v_row, float scale) {
  SHARED_MEMORY(raw);
  const u32 base = shared_address(raw);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  const int q0 = blockIdx.x * M;
  // The first row and column of this lane in a tile of sums; its row and word in ldmatrix of a
  // first operand (or of values), and of keys.
  const int row = warp_m * MI * 16 + lane / 4, column = lane % 4 * 2;
  const int a_row = warp_m * MI * 16 + lane % 16, a_word = lane / 16;
  const int key_row = warp_n * 16 + lane % 8 + lane / 16 * 8, key_word = lane / 8 % 2;
  const float none = __uint_as_float(0xff800000u);  // -infinity
  float* const partial = reinterpret_cast<float*>(raw + kRowsAt);  // [M][WARPS_N]

  Ring ring(Rows(k, k_frame, k_row, keys), Rows(v, v_frame, v_row, keys), base + kRingAt, tid);
  const Rows own(q, q_frame, q_row, queries);
  for (int i = tid; i < M * kFilled / 8; i += kThreads) {
    const int r = i / (kFilled / 8), word = i % (kFilled / 8);
    own.load(base + place<kFilled / 8>(r, word), q0 + r, word);
  }
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; ++i) ring.load();  // the queries land with the first slice

  float o[kParts][MI][NI][4] = {};
  float peak[MI][2], total[MI][2] = {};
#pragma unroll
  for (int mi = 0; mi < MI; ++mi) peak[mi][0] = peak[mi][1] = none;

#pragma unroll 1
  for (int key = 0; key < keys; key += KEYS) {
    float s[MI][2][4] = {};
#pragma unroll 1
    for (int slice = 0; slice < kKeySlices; ++slice) {
      const u32 from = ring.next();
#pragma unroll
      for (int c = 0; c < kKeyChannels / 16; ++c) {
        u32 a[MI][4], b[4];
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
          const int word = slice * (kKeyChannels / 8) + c * 2 + a_word;
          ldmatrix(a[mi], base + place<kFilled / 8>(a_row + mi * 16, word));
        }
        ldmatrix(b, from + place<kKeyChannels / 8>(key_row, c * 2 + key_word));
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
          mma<Type::half>(s[mi][0], a[mi], b[0], b[1]);
          mma<Type::half>(s[mi][1], a[mi], b[2], b[3]);
        }
        if (c == 0) ring.load();
      }
    }

    // Only the last block has keys that there are not.
    if (key + KEYS > keys) {
#pragma unroll
      for (int i = 0; i < MI * 8; ++i) {
        const int at = key + warp_n * 16 + i / 4 % 2 * 8 + column + i % 2;
        if (at >= keys) s[i / 8][i / 4 % 2][i % 4] = none;
      }
    }
#pragma unroll
    for (int i = 0; i < MI * 2; ++i) {
      const int mi = i / 2, half = i % 2;
      float high = fmaxf(fmaxf(s[mi][0][half * 2], s[mi][0][half * 2 + 1]),
                         fmaxf(s[mi][1][half * 2], s[mi][1][half * 2 + 1]));
      high = fmaxf(high, shuffle_xor(high, 1));
      high = fmaxf(high, shuffle_xor(high, 2));
      if (lane % 4 == 0) partial[(row + i * 8) * WARPS_N + warp_n] = high;
    }
    __syncthreads();

    bool higher = false;
    float shrink[MI][2];
#pragma unroll
    for (int i = 0; i < MI * 2; ++i) {
      const int mi = i / 2, half = i % 2;
      float high = peak[mi][half];
#pragma unroll
      for (int j = 0; j < WARPS_N; j += 4) {
        u32 r[4];
        load_shared(r, base + kRowsAt + ((row + i * 8) * WARPS_N + j) * 4);
#pragma unroll
        for (int w = 0; w < 4; ++w) high = fmaxf(high, __uint_as_float(r[w]) * scale);
      }
      shrink[mi][half] = exp2_approx(peak[mi][half] - high);
      higher |= high > peak[mi][half];
      peak[mi][half] = high;
      float sum = 0;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float p0 = exp2_approx(__fmaf_rn(s[mi][t][half * 2], scale, -high));
        const float p1 = exp2_approx(__fmaf_rn(s[mi][t][half * 2 + 1], scale, -high));
        sum += p0 + p1;
        char* const to = raw + kWeightsAt + place<KEYS / 8>(row + i * 8, warp_n * 2 + t);
        *reinterpret_cast<u32*>(to + column * 2) = pack<Type::half>(p0, p1);
      }
      total[mi][half] = __fmaf_rn(total[mi][half], shrink[mi][half], sum);
    }
    // After the first blocks a new maximum is rare; multiplied by 1, nothing changes.
    if (higher) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int mi = 0; mi < MI; ++mi)
#pragma unroll
          for (int i = 0; i < NI * 4; ++i) o[part][mi][i / 4][i % 4] *= shrink[mi][i % 4 / 2];
    }
    __syncwarp();

#pragma unroll 1
    for (int values = 0; values < KEYS; values += kValues) {
      u32 a[kValues / 16][MI][4];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const u32 from = ring.next();
#pragma unroll
        for (int c = 0; c < kValues / 16; ++c) {
          if (part == 0) {
#pragma unroll
            for (int mi = 0; mi < MI; ++mi) {
              const int word = values / 8 + c * 2 + a_word;
              ldmatrix(a[c][mi], base + kWeightsAt + place<KEYS / 8>(a_row + mi * 16, word));
            }
          }
#pragma unroll
          for (int ni = 0; ni < NI; ni += 2) {
            u32 b[4];
            ldmatrix_transposed(b, from + place<kValueChannels / 8>(c * 16 + lane % 16,
                                                                    warp_n * NI + ni + a_word));
#pragma unroll
            for (int mi = 0; mi < MI; ++mi) {
              mma<Type::half>(o[part][mi][ni], a[c][mi], b[0], b[1]);
              mma<Type::half>(o[part][mi][ni + 1], a[c][mi], b[2], b[3]);
            }
          }
          if (c == 0) ring.load();
        }
      }
    }
  }
  cp_wait<0>();

#pragma unroll
  for (int i = 0; i < MI * 2; ++i) {
    float sum = total[i / 2][i % 2];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (lane % 4 == 0) partial[(row + i * 8) * WARPS_N + warp_n] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < MI * 2; ++i) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < WARPS_N; ++j) sum += partial[(row + i * 8) * WARPS_N + j];
    const float share = 1 / sum;
    const int query = q0 + row + i * 8;
    if (query >= queries) continue;
    u16* const to = out + (static_cast<i64>(blockIdx.y) * queries + query) * CHANNELS + column;
#pragma unroll
    for (int j = 0; j < kParts * NI; ++j) {
      const int channel = j / NI * kValueChannels + (warp_n * NI + j % NI) * 8;
      const float* const sums = o[j / NI][i / 2][j % NI] + i % 2 * 2;
      if (kFilled == CHANNELS || channel < CHANNELS)
        store_global(to + channel, pack<Type::half>(sums[0] * share, sums[1] * share));
    }
  }
}

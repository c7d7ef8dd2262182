// 3x3x3 convolution by Winograd F(2,3) along time and along rows: 48 products for 2 x 2 output pixels
// of a column, where time alone takes 72 and a direct convolution 108. For cards whose tensor cores
// are slow beside the rest (GeForce).
//
// The input holds frames transformed along time, as for conv3x3_mma.cu. The transform along rows is
// made in registers, from the pixels of neighbouring rows. One tile: ROWS x 16 pixels of a pair of
// frames, BN channels. Accumulators A and B (of time, as in conv3x3_mma.cu), each of pairs of rows
// (U, V): one pass gathers the products y1 and y2 of rows, then (U + V, U - V), then the other pass
// adds y0 and -y3. For the last two frames the passes come in the other order, so that A and B change
// their basis together. Pairs of rows begin at even rows of the picture.
// A step: KC = 16 channels of a halo tile and the weights of three columns of taps, a pass's two
// products each; a ring of STAGES.
//
// No layer is given this form yet. The second change of basis rounds both rows of a pair together, so
// a row's last bits depend on all four rows that its pair reads. A shard has them; a strip, whose
// halo counts one row for each convolution, has not, and would lose promise 2. Sums in float16 save
// more on the cards that this is for.
//
// The sum of an output pixel runs over (frame and pass, 16 channels, columns of taps), wherever it is.
// HALF_SUMS: the products of PROMOTE steps, 48 each, are summed in float16, then added in float32.
//
// Macros: see conv3x3_tile.cuh; STAGES, PROMOTE.

constexpr int NP = MI / 2;            // pairs of rows of a warp
constexpr int kWeights = 6 * kTap;    // of a step
constexpr int kSegments = 8;          // frames times passes
constexpr int kStage = kInput + kWeights;
constexpr int kBiasAt = STAGES * kStage;
constexpr int kSharedBytes = kBiasAt + kBlocks * BN * 4;
static_assert(kSharedBytes <= 101376, "99 KiB");
static_assert(KC == 16 && NI % 2 == 0 && MI % 2 == 0 && kInput % 64 == 0, "");
static_assert(kChunks % PROMOTE == 0 && kSegments * kChunks >= STAGES, "");

// One step: 16 channels, three columns of taps, the two products of PASS. `between(kx)` runs within
// each column.
template <int PASS, class Between>
INLINE void products(Sums& d, u32 rows_at, u32 weights, int lane, Between between) {
#pragma unroll
  for (int kx = 0; kx < 3; ++kx) {
    const int column = lane % 16 + kx;
    const u32 pixels = rows_at + column * kPixel + swizzle(column, lane / 16) * 16;
    u32 f[2][NP][4];
    if (PASS == 0) {
#pragma unroll
      for (int p = 0; p < NP; ++p) {
        u32 r[2][4];
        ldmatrix(r[0], pixels + (2 * p + 1) * kRow);
        ldmatrix(r[1], pixels + (2 * p + 2) * kRow);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          f[0][p][i] = add_halves(r[0][i], r[1][i]);
          f[1][p][i] = subtract_halves(r[1][i], r[0][i]);
        }
      }
    }
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      if (PASS == 1) {
        u32 r[NP + 1][4];
#pragma unroll
        for (int i = 0; i <= NP; ++i) ldmatrix(r[i], pixels + (2 * i + y) * kRow);
#pragma unroll
        for (int p = 0; p < NP; ++p) {
#pragma unroll
          for (int i = 0; i < 4; ++i) f[y][p][i] = subtract_halves(r[p][i], r[p + 1][i]);
        }
      }
      u32 b[NI / 2][4];
#pragma unroll
      for (int repeat = 0; repeat < REPEAT; ++repeat) {
#pragma unroll
        for (int j = 0; j < NI / 2; ++j) {
          if (repeat == 0) load_shared(b[j], weights + (kx * 2 + y) * kTap + j * 512);
#pragma unroll
          for (int p = 0; p < NP; ++p) {
            multiply(d[2 * p + y][2 * j], f[y][p], b[j][0], b[j][1]);
            multiply(d[2 * p + y][2 * j + 1], f[y][p], b[j][2], b[j][3]);
          }
        }
      }
      if (y == 0) between(kx);
    }
  }
}

// (u, v) = (u + v, u - v) * scale of each pair of rows.
INLINE void change_rows(float (&d)[MI][NI][4], float scale) {
#pragma unroll
  for (int p = 0; p < NP; ++p) {
#pragma unroll
    for (int n = 0; n < NI; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& u = d[2 * p][n][i];
        float& v = d[2 * p + 1][n][i];
        u += v;
        v = __fmaf_rn(-2.0f, v, u);
        u *= scale;
        v *= scale;
      }
    }
  }
}

// Arguments: as in conv3x3_mma.cu.
extern "C" __global__ void __launch_bounds__(kThreads, RESIDENT)
conv3x3(const char* RESTRICT x, const char* RESTRICT weights, const float* RESTRICT bias,
        const void* RESTRICT residual, void* RESTRICT out, int frames, int h, int w, int height,
        int width, int groups, int group_stride, int batch_stride, int pad_y, int pad_x, int tiles) {
  SHARED_MEMORY(raw);
  const u32 base = shared_address(raw);
  float* bias_shared = reinterpret_cast<float*>(raw + kBiasAt);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  const int columns = (width + 15) / 16, rows = (height + ROWS - 1) / ROWS;

  for (int c = tid; c < kBlocks * BN; c += kThreads) bias_shared[c] = c < COUT ? bias[c] : 0.0f;

  HaloTiles halo(x, h, w, base, tid);
  Weights<kWeights, static_cast<u32>(kSegments) * kChunks * kWeights> ring(
      weights, base + kInput, tid);
  const auto begin_tile = [&](int index) {
    const Tile tile(index, columns, rows, groups);
    const int clip = tile.group / groups, group = tile.group % groups;
    halo.begin(clip * batch_stride + group * group_stride + 1, tile.y - pad_y, tile.x - pad_x);
  };
  // Where the step after the next comes from; false at the tile's end.
  const auto next_input = [&]() {
    const int segment = ++halo.step / kChunks;
    // Frames 1 2 1 2 0 3 0 3.
    const int by = segment == 4 ? -2 : segment < 4 ? (segment & 1 ? 1 : -1) : (segment & 1 ? 3 : -3);
    halo.next_chunk(by);
    return halo.step < kSegments * kChunks;
  };

  const u32 my_pixels = base + warp_m * MI * kRow;
  const u32 my_weights = base + kInput + warp_n * (NI * 256) + lane * 16;

  float a[MI][NI][4], b[MI][NI][4];
  int index = blockIdx.x;
  if (index >= tiles) return;
  begin_tile(index);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    for (int turn = 0; turn < HaloTiles::kTurns; ++turn) halo.load(stage * kStage, turn);
#pragma unroll
    for (int turn = 0; turn < ring.kTurns; ++turn) ring.load(stage * kStage, turn, tid);
    ring.offset += kWeights;
    next_input();  // a tile has at least as many steps as the ring has stages
    cp_commit();
  }
  int stage = 0, to_stage = (STAGES - 1) * kStage;

  const auto begin_step = [&]() {
    cp_wait<STAGES - 2>();
    __syncthreads();
  };
  const auto load = [&](int kx) {
    constexpr int kPieces = HaloTiles::kTurns + decltype(ring)::kTurns;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece * 3 / kPieces != kx) continue;
      if (piece < HaloTiles::kTurns) halo.load(to_stage, piece);
      else ring.load(to_stage, piece - HaloTiles::kTurns, tid);
    }
  };
  const auto end_step = [&]() {
    cp_commit();
    ring.next_step();
    if (!next_input()) {
      const int next = index + gridDim.x;
      if (next < tiles) begin_tile(next);
      else halo.begin_nothing();
    }
    stage = stage == (STAGES - 1) * kStage ? 0 : stage + kStage;
    to_stage = to_stage == (STAGES - 1) * kStage ? 0 : to_stage + kStage;
  };
  // All channels of one frame and pass.
  const auto segment = [&](int pass, float (&d)[MI][NI][4]) {
#pragma unroll 1
    for (int c = 0; c < kChunks; c += PROMOTE) {
#if HALF_SUMS
      Sums t;
      clear(t);
      Sums& sums = t;
#else
      Sums& sums = d;
#endif
#pragma unroll 1
      for (int i = 0; i < PROMOTE; ++i) {
        begin_step();
        if (pass == 0) products<0>(sums, my_pixels + stage, my_weights + stage, lane, load);
        else products<1>(sums, my_pixels + stage, my_weights + stage, lane, load);
        end_step();
      }
#if HALF_SUMS
      add_half_sums(d, t);
#endif
    }
  };

  for (; index < tiles; index += gridDim.x) {
    ring.begin(index);
    clear(a);
    clear(b);
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (quarter == 0 || quarter == 3) {
        segment(0, a);
        segment(0, b);
      } else {
        segment(1, a);
        segment(1, b);
      }
      if (quarter == 1) {
        sums_and_differences(a, b);
        if (residual) {
          const Tile tile(index, columns, rows, groups);
          prefetch_residual(residual, tile, groups, frames, height, width, tid);
        }
      } else {
        change_rows(a, quarter == 2 ? 0.5f : 1.0f);
        change_rows(b, quarter == 2 ? 0.5f : 1.0f);
      }
    }
    const Tile tile(index, columns, rows, groups);
    const int clip = tile.group / groups, first = first_frame(tile.group % groups, frames);
    const int channel = tile.block * BN + warp_n * (NI * 8);
    const int px = tile.x + lane / 4, py = tile.y + warp_m * MI;
    const long long plane = static_cast<long long>(height) * width;
    const long long pixel = (static_cast<long long>(clip) * frames + first) * plane +
                            static_cast<long long>(py) * width + px;
    u16* to = static_cast<u16*>(out);
    const u16* add = static_cast<const u16*>(residual);
    if (first >= 0) {
      store(a, Place{pixel, width, 8, px, py, width, height}, to, add, bias_shared + channel,
            channel, lane);
    }
    store(b, Place{pixel + plane, width, 8, px, py, width, height}, to, add, bias_shared + channel,
          channel, lane);
  }
  cp_wait<0>();
}

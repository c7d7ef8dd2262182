// The most that a card's tensor cores do by mma.sync: independent products, nothing else. Behind
// machine.cuh. HALF_SUMS: sums in float16.
extern "C" __global__ void __launch_bounds__(256)
ceiling(u32* out, int rounds) {
  u32 a[4] = {threadIdx.x, 1, 2, 3};
#if HALF_SUMS
  u32 d[24][2] = {};
#else
  float d[24][4] = {};
#endif
  // So long that the loop's own instructions do not count.
#pragma unroll 4
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 24; ++i) {
#if HALF_SUMS
      mma_half_sums(d[i], a, a[1], a[2]);
#else
      mma<Type::half>(d[i], a, a[1], a[2]);
#endif
    }
  }
  u32 sum = 0;
#pragma unroll
  for (int i = 0; i < 24; ++i) {
#if HALF_SUMS
    sum += d[i][0] + d[i][1];
#else
    sum += static_cast<u32>(d[i][0] + d[i][1] + d[i][2] + d[i][3]);
#endif
  }
  if (sum == 0x12345678u) out[threadIdx.x] = sum;  // never, but the compiler does not know
}

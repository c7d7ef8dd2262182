// Winograd along time, number by number: F(2,3) of Lavin and Gray, and F(4,3) with the points of
// winograd.py. Stands behind machine.cuh or hopper.cuh. Everything is done in place: with another
// place for a difference the compiler makes room for all of them at once by putting sums aside.

// The points of F(4,3): 0, p, -p, q, -q and infinity.
constexpr float kPoint = 0.6875f, kFarPoint = 1.375f;
constexpr float kPointSquared = kPoint * kPoint, kFarPointSquared = kFarPoint * kFarPoint;

// (a, b) = (a + b, a - b)
__device__ __forceinline__ void sum_and_difference(float& a, float& b) {
  a += b;
  b = __fmaf_rn(-2.0f, b, a);
}

// The sums of the products of p, -p, q and -q -> four frames, which the products of 0 and infinity are
// missing: A' of winograd.py.
__device__ __forceinline__ void frames_of_quad(float& y0, float& y1, float& y2, float& y3) {
  constexpr float kRest = kFarPointSquared - kPointSquared;
  sum_and_difference(y0, y1);  // even and odd part of p
  sum_and_difference(y2, y3);  // of q
  y0 += y2;
  y2 = __fmaf_rn(kPointSquared, y0, kRest * y2);
  y1 = __fmaf_rn(kPoint, y1, kFarPoint * y3);
  y3 = __fmaf_rn(kPointSquared, y1, kFarPoint * kRest * y3);
}

// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the step on a run of elements that lie side by side, and sums of squares in one
// fixed order. Contraction is off and fused multiply-adds are written out where torch has them, so
// that W, V and momentum are those of the reference to the bit wherever no norm is involved.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr int CHUNK = 1024;  // elements that stay in the first-level cache between two loops
constexpr int LANES = 32;
constexpr int STRIDE = 64;   // elements between two looks ahead
constexpr int AHEAD = 512;   // elements; too near arrives late, too far is gone again
constexpr int SHORT = 64;    // rows of blocks up to this length are taken several at a time

inline float fma_(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
inline double fma_(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// How each dtype is read and rounded; the arithmetic is in `Wide`, which is also the dtype of V.
struct Float {
  using Stored = float;
  using Wide = float;
  static Wide read(Stored x) { return x; }
  static Stored round(Wide x) { return x; }
};
struct Double {
  using Stored = double;
  using Wide = double;
  static Wide read(Stored x) { return x; }
  static Stored round(Wide x) { return x; }
};
struct BFloat16 {
  using Stored = uint16_t;
  using Wide = float;
  static Wide read(Stored x) {
    uint32_t bits = uint32_t(x) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
  static Stored round(Wide x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x != x ? uint16_t(0x7fc0) : uint16_t(nearest);
  }
};
#ifdef __FLT16_MANT_DIG__
struct Half {
  using Stored = _Float16;
  using Wide = float;
  static Wide read(Stored x) { return Wide(x); }
  static Stored round(Wide x) { return Stored(x); }
};
#endif

struct Options {  // of one param group
  double lr, kappa, nu, momentum, dampening, weight_decay;
  int64_t nesterov, maximize;
};

template <class W>
struct Factors {
  W lr, minus_klr, kappa, nu, lam, momentum, undamped, decay, sign, of_buffer, of_gradient;
  // Options that are off multiply by one or zero, which is exact: one loop serves them all.
  Factors(const Options &o, double lam_, bool fresh)
      : lr(W(o.lr)), minus_klr(W(-(o.kappa * o.lr))), kappa(W(o.kappa)), nu(W(o.nu)), lam(W(lam_)),
        momentum(W(o.momentum)), undamped(fresh ? W(1) : W(1 - o.dampening)),
        decay(W(o.weight_decay)), sign(o.maximize ? W(-1) : W(1)),
        of_buffer(o.nesterov ? W(o.momentum) : W(1)), of_gradient(o.nesterov ? W(1) : W(0)) {}
};

// How a chunk finds the factor kappa max(0, 1 - lam/||V_g||) of its elements.
enum Scale { NO_V, SOFT_V, ONE_SCALE, MANY_SCALES };

// The addresses and factors of a chunk; `scale` is that of ONE_SCALE, `scales` of MANY_SCALES.
template <class T>
struct Chunk {
  using Stored = typename T::Stored;
  using W = typename T::Wide;
  Stored *__restrict w;
  const Stored *__restrict g;
  const Stored *__restrict old;
  Stored *__restrict m;
  W *__restrict v;
  const W *__restrict scales;
  W scale;
  Factors<W> f;
};

template <class T, int S>
inline typename T::Wide gamma_of(const Chunk<T> &c, int64_t i) {
  const auto v = c.v[i];
  if (S == ONE_SCALE) return v * c.scale;
  if (S == MANY_SCALES) return v * c.scales[i];
  const auto low = v < -c.f.lam ? -c.f.lam : v;
  return (v - (low > c.f.lam ? c.f.lam : low)) * c.f.kappa;
}

// The step of docs/mathematics.md for one element, in `Wide`; returns the new V. Float and double
// round as torch's operators do.
template <class T, int S, bool MOMENTUM>
inline typename T::Wide advance_one(const Chunk<T> &c, int64_t i) {
  using W = typename T::Wide;
  const W now = T::read(c.w[i]);
  W d = fma_(now, c.f.decay, c.f.sign * T::read(c.g[i]));
  if (MOMENTUM) {
    const W b = fma_(d, c.f.undamped, T::read(c.m[i]) * c.f.momentum);
    c.m[i] = T::round(b);
    d = fma_(b, c.f.of_buffer, d * c.f.of_gradient);
  }
  W next = fma_(d, c.f.minus_klr, now), v = W(0);
  if (S != NO_V) {
    // Old W and old Gamma on purpose: both updates use the values before the step.
    const W r = (now - gamma_of<T, S>(c, i)) / c.f.nu;
    c.v[i] = v = fma_(r, c.f.lr, c.v[i]);
    next = fma_(r, c.f.minus_klr, next);
  }
  c.w[i] = T::round(next);
  return v;
}

// The coupling alone, around another optimizer that has moved W from `old`.
template <class T, int S>
inline typename T::Wide couple_one(const Chunk<T> &c, int64_t i) {
  const auto r = (T::read(c.old[i]) - gamma_of<T, S>(c, i)) / c.f.nu;
  c.w[i] = T::round(fma_(r, c.f.minus_klr, T::read(c.w[i])));
  return c.v[i] = fma_(r, c.f.lr, c.v[i]);
}

enum Mode { COUPLE, PLAIN_STEP, MOMENTUM_STEP };

template <class T, int S, int MODE>
inline typename T::Wide move_one(const Chunk<T> &c, int64_t i) {
  return MODE == COUPLE ? couple_one<T, S>(c, i) : advance_one<T, S, MODE == MOMENTUM_STEP>(c, i);
}

inline void fetch(const void *at) { __builtin_prefetch(at, 1, 0); }

// Moves a chunk. With `sums`, adds the squares of the new V to lanes, in the order of
// `sum_of_squares`. What comes next in memory is asked for ahead: hardware stops at page borders.
template <class T, int S, int MODE, bool SUMS>
void move_all(Chunk<T> c, int64_t n, double *__restrict lane) {
  using Stored = typename T::Stored;
  int64_t i = 0;
  for (; i + STRIDE <= n; i += STRIDE) {
    for (size_t k = 0; k < STRIDE; k += 64 / sizeof(Stored)) {
      fetch(c.w + i + AHEAD + k);
      fetch((MODE == COUPLE ? c.old : c.g) + i + AHEAD + k);
      if (MODE == MOMENTUM_STEP) fetch(c.m + i + AHEAD + k);
    }
    if (S != NO_V)
      for (size_t k = 0; k < STRIDE; k += 64 / sizeof(*c.v)) fetch(c.v + i + AHEAD + k);
    for (int64_t j = i; j < i + STRIDE; j += LANES)
      for (int l = 0; l < LANES; l++) {
        const double v = double(move_one<T, S, MODE>(c, j + l));
        if (SUMS) lane[l] = fma_(v, v, lane[l]);
      }
  }
  for (; i < n; i++) {
    const double v = double(move_one<T, S, MODE>(c, i));
    if (SUMS) lane[i % LANES] = fma_(v, v, lane[i % LANES]);
  }
}

inline double joined(double *lane) {
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) lane[l] += lane[l + half];
  return lane[0];
}

template <class W>
double sum_of_squares(const W *__restrict v, int64_t n) {
  if (n < LANES) {
    W sum = 0;
    for (int64_t i = 0; i < n; i++) sum = fma_(v[i], v[i], sum);
    return sum;
  }
  double lane[LANES] = {0};
  for (; n >= LANES; n -= LANES, v += LANES)
    for (int l = 0; l < LANES; l++) lane[l] = fma_(double(v[l]), double(v[l]), lane[l]);
  for (int64_t l = 0; l < n; l++) lane[l] = fma_(double(v[l]), double(v[l]), lane[l]);
  return joined(lane);
}

template <class W>
void add_squares(const W *__restrict v, double *__restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; i++) sums[i] = fma_(double(v[i]), double(v[i]), sums[i]);
}

}  // namespace

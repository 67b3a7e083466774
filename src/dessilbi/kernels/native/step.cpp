// SPDX-License-Identifier: Apache-2.0
// One streaming pass over W, gradient, momentum and V that leaves sums of squares of the new V.
//
// A plain C interface: no header of torch, so one build serves every version of it. Threads are
// torch's own; its parallel_for comes in as a function pointer. Every sum has one order, fixed by
// the tiles and not by the threads, and no two threads add to the same number: the same bits on
// any number of threads. Contraction is off and fused multiply-adds are written out where torch
// has them, so that W, V and momentum are those of the reference to the bit wherever no norm
// is involved. kernels/cpu.py declares the same structs; kernels/layout.py explains levels.

#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int MAX_LEVELS = 16;
constexpr int CHUNK = 1024;  // elements that stay in the first-level cache between two loops
constexpr int LANES = 32;
constexpr int SHORT = 64;    // rows of blocks below this length are taken several at a time

enum Dtype { F32, F64, BF16, F16 };
enum Kind { PLAIN, SOFT, BLOCKS };

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

}  // namespace

extern "C" {

struct Options {  // of one param group
  double lr, kappa, nu, momentum, dampening, weight_decay;
  int64_t nesterov, maximize;
};

struct Tensor {
  void *w, *m, *v, *scale;
  const void *old;  // W before another optimizer moved it; null: the whole step is ours
  double *sums;     // [tiles along inner levels, blocks]
  double lam;       // of SOFT
  int64_t dtype, kind, group;
  int64_t fresh;  // momentum holds nothing yet
  int64_t moves;  // else only its norms take part
  int64_t num_levels, innermost_is_grid, num_tiles, first_tile, num_inner_tiles, num_blocks;
  int64_t size[MAX_LEVELS], tile[MAX_LEVELS];
};

struct Unit {
  int64_t first_member, num_members, num_blocks;
  double lam;
  const double *lams;  // per block, in place of lam; null: lam
};

typedef void (*Work)(int64_t, int64_t, void *);
typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, Work, void *);

struct Plan {
  Tensor *tensors;
  const Options *options;
  const Unit *units;
  const int64_t *members;    // indices of tensors, unit after unit
  const void *const *grads;  // of the tensors
  int64_t num_tensors, num_units, num_tiles, num_threads;
  ParallelFor parallel_for;
};
}

namespace {

template <class W>
struct Factors {
  W lr, minus_klr, kappa, nu, lam, momentum, undamped, decay, sign, of_buffer, of_gradient;
  // Options that are off multiply by one or zero, which is exact: one loop serves them all.
  Factors(const Options &o, const Tensor &t)
      : lr(W(o.lr)), minus_klr(W(-(o.kappa * o.lr))), kappa(W(o.kappa)), nu(W(o.nu)), lam(W(t.lam)),
        momentum(W(o.momentum)), undamped(t.fresh ? W(1) : W(1 - o.dampening)),
        decay(W(o.weight_decay)), sign(o.maximize ? W(-1) : W(1)),
        of_buffer(o.nesterov ? W(o.momentum) : W(1)), of_gradient(o.nesterov ? W(1) : W(0)) {}
};

// How a chunk finds the factor kappa max(0, 1 - lam/||V_g||) of its elements.
enum Scale { NO_V, SOFT_V, ONE_SCALE, MANY_SCALES };

// Gamma of one element; `s` is its factor.
template <int S, class W>
inline W gamma_of(W v, W s, const Factors<W> &f) {
  if (S != SOFT_V) return v * s;
  const W low = v < -f.lam ? -f.lam : v;
  return (v - (low > f.lam ? f.lam : low)) * f.kappa;
}

// The step of docs/mathematics.md in `Wide`; float and double round as torch's operators do.
template <class T, int S, bool MOMENTUM>
void advance(typename T::Stored *__restrict w, const typename T::Stored *__restrict g,
             typename T::Stored *__restrict m, typename T::Wide *__restrict v,
             const typename T::Wide *__restrict s, int64_t n, Factors<typename T::Wide> f) {
  using W = typename T::Wide;
  const W scale = S == ONE_SCALE ? *s : W(0);
  for (int64_t i = 0; i < n; i++) {
    const W now = T::read(w[i]);
    W d = fma_(now, f.decay, f.sign * T::read(g[i]));
    if (MOMENTUM) {
      const W b = fma_(d, f.undamped, T::read(m[i]) * f.momentum);
      m[i] = T::round(b);
      d = fma_(b, f.of_buffer, d * f.of_gradient);
    }
    W next = fma_(d, f.minus_klr, now);
    if (S != NO_V) {
      // Old W and old Gamma on purpose: both updates use the values before the step.
      const W r = (now - gamma_of<S>(v[i], S == ONE_SCALE ? scale : S == MANY_SCALES ? s[i] : W(0), f)) / f.nu;
      v[i] = fma_(r, f.lr, v[i]);
      next = fma_(r, f.minus_klr, next);
    }
    w[i] = T::round(next);
  }
}

// The coupling alone, around another optimizer that has moved W from `old`.
template <class T, int S>
void couple(typename T::Stored *__restrict w, const typename T::Stored *__restrict old,
            typename T::Wide *__restrict v, const typename T::Wide *__restrict s, int64_t n,
            Factors<typename T::Wide> f) {
  using W = typename T::Wide;
  const W scale = S == ONE_SCALE ? *s : W(0);
  for (int64_t i = 0; i < n; i++) {
    const W r = (T::read(old[i]) - gamma_of<S>(v[i], S == ONE_SCALE ? scale : S == MANY_SCALES ? s[i] : W(0), f)) / f.nu;
    v[i] = fma_(r, f.lr, v[i]);
    w[i] = T::round(fma_(r, f.minus_klr, T::read(w[i])));
  }
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
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) lane[l] += lane[l + half];
  return lane[0];
}

template <class W>
void add_squares(const W *__restrict v, double *__restrict sums, int64_t n) {
  for (int64_t i = 0; i < n; i++) sums[i] = fma_(double(v[i]), double(v[i]), sums[i]);
}

// One tile of one tensor. `STEP` false: only the sums of squares of V as it is.
template <class T, bool STEP>
struct Tile {
  using Stored = typename T::Stored;
  using W = typename T::Wide;
  const Tensor &t;
  const Stored *g;
  const Factors<W> f;
  double *sums;  // of the blocks, for this tile's place along inner levels
  int64_t low[MAX_LEVELS], high[MAX_LEVELS];
  W spread[CHUNK];

  Tile(const Tensor &t_, const void *g_, const Options &o, int64_t tile)
      : t(t_), g(static_cast<const Stored *>(g_)), f(o, t_) {
    int64_t count[MAX_LEVELS], place = 0;
    for (int64_t k = t.num_levels - 1; k >= 0; k--) {
      count[k] = (t.size[k] + t.tile[k] - 1) / t.tile[k];
      low[k] = tile % count[k] * t.tile[k];
      high[k] = low[k] + t.tile[k] < t.size[k] ? low[k] + t.tile[k] : t.size[k];
      tile /= count[k];
    }
    for (int64_t k = 0; k < t.num_levels; k++)
      if (!is_grid(k)) place = place * count[k] + low[k] / t.tile[k];
    sums = t.sums + place * t.num_blocks;
  }

  // Levels alternate between the grid of blocks and the inside of a block.
  bool is_grid(int64_t k) const { return ((t.num_levels - 1 - k) % 2 == 0) == !!t.innermost_is_grid; }

  void run() {
    int64_t at[MAX_LEVELS];
    const int64_t outer = t.num_levels - 2;  // the last two levels are walked by `rows`
    for (int64_t k = 0; k < outer; k++) at[k] = low[k];
    while (true) {
      int64_t element = 0, block = 0;
      for (int64_t k = 0; k < outer; k++) {
        element = element * t.size[k] + at[k];
        if (is_grid(k)) block = block * t.size[k] + at[k];
      }
      rows(element, block);
      int64_t k = outer - 1;
      for (; k >= 0 && ++at[k] == high[k]; k--) at[k] = low[k];
      if (k < 0) return;
    }
  }

  void rows(int64_t element, int64_t block) {
    const int64_t last = t.num_levels - 1, width = t.size[last];
    const bool in_grid = t.innermost_is_grid;
    const int64_t first = last ? low[last - 1] : 0, end = last ? high[last - 1] : 1;
    if (last) element *= t.size[last - 1];
    if (last && !in_grid) block *= t.size[last - 1];
    const bool whole = low[last] == 0 && high[last] == width;
    const bool together = t.kind == BLOCKS && whole && width <= (in_grid ? CHUNK / 2 : SHORT);
    const int64_t step = together ? CHUNK / width : 1;
    for (int64_t x = first; x < end; x += step) {
      const int64_t count = x + step < end ? step : end - x;
      if (together) {
        const int64_t at = (element + x) * width;
        if (in_grid)
          columns(at, block * width, count, width);
        else if (width == 9)  // 3 x 3 kernels
          short_rows<9>(at, block + x, count, width);
        else
          short_rows<0>(at, block + x, count, width);
        continue;
      }
      for (int64_t y = low[last]; y < high[last]; y += CHUNK) {
        const int64_t n = y + CHUNK < high[last] ? CHUNK : high[last] - y;
        const int64_t at = (element + x) * width + y;
        if (in_grid) {
          const int64_t own = block * width + y;
          move<MANY_SCALES>(at, scales() + own, n);
          add_squares(v() + at, sums + own, n);
        } else {
          long_row(at, block + (last ? x : 0), n);
        }
      }
    }
  }

  void long_row(int64_t at, int64_t block, int64_t n) {
    if (t.kind == PLAIN) return move<NO_V>(at, nullptr, n);
    if (t.kind == SOFT) return move<SOFT_V>(at, nullptr, n);
    move<ONE_SCALE>(at, scales() + block, n);
    sums[block] += sum_of_squares(v() + at, n);
  }

  template <int WIDTH>
  void short_rows(int64_t at, int64_t block, int64_t count, int64_t any_width) {
    const int64_t width = WIDTH ? WIDTH : any_width;
    if (STEP) {
      W *next = spread;
      for (int64_t x = 0; x < count; x++)
        for (int64_t y = 0; y < width; y++) *next++ = scales()[block + x];
    }
    move<MANY_SCALES>(at, spread, count * width);
    for (int64_t x = 0; x < count; x++)
      sums[block + x] += sum_of_squares(v() + at + x * width, width);
  }

  void columns(int64_t at, int64_t block, int64_t count, int64_t width) {
    if (STEP)
      for (int64_t x = 0; x < count; x++)
        std::memcpy(spread + x * width, scales() + block, width * sizeof(W));
    move<MANY_SCALES>(at, spread, count * width);
    for (int64_t x = 0; x < count; x++) add_squares(v() + at + x * width, sums + block, width);
  }

  W *v() const { return static_cast<W *>(t.v); }
  const W *scales() const { return static_cast<const W *>(t.scale); }

  template <int S>
  void move(int64_t at, const W *s, int64_t n) {
    if (!STEP) return;
    Stored *w = static_cast<Stored *>(t.w) + at;
    if (t.old) return couple<T, S>(w, static_cast<const Stored *>(t.old) + at, v() + at, s, n, f);
    W *own = S == NO_V ? nullptr : v() + at;
    if (t.m)
      advance<T, S, true>(w, g + at, static_cast<Stored *>(t.m) + at, own, s, n, f);
    else
      advance<T, S, false>(w, g + at, nullptr, own, s, n, f);
  }
};

template <bool STEP>
void run_tile(const Plan &plan, int64_t tensor, int64_t tile) {
  const Tensor &t = plan.tensors[tensor];
  const Options &o = plan.options[t.group];
  const void *g = STEP ? plan.grads[tensor] : nullptr;
  switch (t.dtype) {
    case F32: return Tile<Float, STEP>(t, g, o, tile).run();
    case F64: return Tile<Double, STEP>(t, g, o, tile).run();
    case BF16: return Tile<BFloat16, STEP>(t, g, o, tile).run();
#ifdef __FLT16_MANT_DIG__
    case F16: return Tile<Half, STEP>(t, g, o, tile).run();
#endif
  }
}

template <bool STEP>
void run_tiles(const Plan &plan, int64_t tile, int64_t end) {
  int64_t low = 0, high = plan.num_tensors - 1;
  while (low < high) {  // the last tensor whose first tile is not behind this one
    const int64_t middle = (low + high + 1) / 2;
    plan.tensors[middle].first_tile <= tile ? low = middle : high = middle - 1;
  }
  for (; tile < end; tile++) {
    while (tile >= plan.tensors[low].first_tile + plan.tensors[low].num_tiles) low++;
    const Tensor &t = plan.tensors[low];
    if (!STEP || t.moves) run_tile<STEP>(plan, low, tile - t.first_tile);
  }
}

// kappa max(0, 1 - lam/||V_u||) of some blocks of a unit, from the sums the last step left; those
// of tensors that move are set back to zero for the sums of this step.
template <class W>
void store_scales(const Tensor &t, const double *scale, int64_t block, int64_t n, double kappa) {
  W *own = static_cast<W *>(t.scale) + block;
  for (int64_t i = 0; i < n; i++) own[i] = W(scale[i]) * W(kappa);
}

void scale_blocks(const Plan &plan, const Unit &unit, int64_t block, int64_t n) {
  double total[CHUNK] = {0}, own[CHUNK];
  for (int64_t j = 0; j < unit.num_members; j++) {
    const Tensor &t = plan.tensors[plan.members[unit.first_member + j]];
    std::memset(own, 0, n * sizeof(double));
    for (int64_t k = 0; k < t.num_inner_tiles; k++) {
      double *part = t.sums + k * t.num_blocks + block;
      for (int64_t i = 0; i < n; i++) own[i] += part[i];
      if (t.moves) std::memset(part, 0, n * sizeof(double));
    }
    for (int64_t i = 0; i < n; i++) total[i] += own[i];
  }
  for (int64_t i = 0; i < n; i++) {
    const double norm = std::sqrt(total[i]), lam = unit.lams ? unit.lams[block + i] : unit.lam;
    // As structure.shrink_scale: positive exactly above lam, and a NaN stays visible.
    total[i] = norm <= lam ? 0.0 : (norm - lam) / norm;
  }
  for (int64_t j = 0; j < unit.num_members; j++) {
    const Tensor &t = plan.tensors[plan.members[unit.first_member + j]];
    const double kappa = plan.options[t.group].kappa;
    t.dtype == F64 ? store_scales<double>(t, total, block, n, kappa)
                   : store_scales<float>(t, total, block, n, kappa);
  }
}

// Hands out pieces of work to the threads of torch's pool as they come for it. All of them take
// over the caller's floating point environment: torch.set_flush_denormal sets it for one thread.
struct Queue {
  const Plan *plan;
  void (*work)(const Plan &, int64_t, int64_t);
  int64_t end, piece;
  std::fenv_t environment;
  std::atomic<int64_t> next{0};

  static void take(int64_t, int64_t, void *self) {
    Queue &q = *static_cast<Queue *>(self);
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&q.environment);
    for (int64_t at; (at = q.next.fetch_add(q.piece, std::memory_order_relaxed)) < q.end;)
      q.work(*q.plan, at, at + q.piece < q.end ? at + q.piece : q.end);
    std::fesetenv(&own);
  }
};

void share(const Plan &plan, void (*work)(const Plan &, int64_t, int64_t), int64_t count,
           int64_t piece) {
  Queue queue{&plan, work, count, piece, {}};
  std::fegetenv(&queue.environment);
  const int64_t pieces = (count + piece - 1) / piece;
  const int64_t threads = plan.num_threads < pieces ? plan.num_threads : pieces;
  if (threads < 2 || plan.parallel_for(0, threads, 1, Queue::take, &queue) != 0)
    Queue::take(0, 0, &queue);
}

void scale_units(const Plan &plan, int64_t at, int64_t end) {
  int64_t first = 0;  // blocks are numbered through all units
  for (int64_t i = 0; i < plan.num_units && first < end; i++) {
    const Unit &unit = plan.units[i];
    const int64_t low = at > first ? at - first : 0;
    const int64_t high = end - first < unit.num_blocks ? end - first : unit.num_blocks;
    for (int64_t block = low; block < high; block += CHUNK)
      scale_blocks(plan, unit, block, high - block < CHUNK ? high - block : CHUNK);
    first += unit.num_blocks;
  }
}

}  // namespace

extern "C" {

// Struct sizes, so that kernels/cpu.py can tell that both sides mean the same.
int64_t dessilbi_size(int64_t which) {
  const int64_t sizes[] = {sizeof(Options), sizeof(Tensor), sizeof(Unit), sizeof(Plan)};
  return sizes[which];
}

int64_t dessilbi_has_float16() {
#ifdef __FLT16_MANT_DIG__
  return 1;
#else
  return 0;
#endif
}

// The sums of squares of one tensor's V, as a step would have left them.
void dessilbi_sums(const Plan *plan, int64_t tensor) {
  const Tensor &t = plan->tensors[tensor];
  std::memset(t.sums, 0, sizeof(double) * t.num_inner_tiles * t.num_blocks);
  Plan part = *plan;
  Tensor alone = t;
  alone.first_tile = 0;
  part.tensors = &alone;
  part.num_tensors = 1;
  share(part, run_tiles<false>, t.num_tiles, 1);
}

void dessilbi_step(const Plan *plan) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < plan->num_units; i++) blocks += plan->units[i].num_blocks;
  if (blocks) share(*plan, scale_units, blocks, 4096);
  if (plan->num_tiles) share(*plan, run_tiles<true>, plan->num_tiles, 1);
}
}

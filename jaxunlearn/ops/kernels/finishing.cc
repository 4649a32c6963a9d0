// A normalised image written out, where no convolution reads it: with the residual sum and ReLU, or 2x2 max-pooled.
// Bound by memory, so every array is passed over once.

#include <numeric>

#include "elements.h"

namespace {

constexpr int kChunk = 1 << 15;  // numbers that a thread takes at a time

template <class V>
inline void Add(float* to, V value) { Store(to, Load<V>(to) + value); }

// In both of these NaN stays NaN.
template <class V>
inline V Positive(V v) { return v < V{} ? V{} : v; }
template <class V>
inline V Higher(V a, V b) { return (a > b) | (a != a) ? a : b; }

// out[c] = sum over chunks and repetitions of parts[chunk][c + repetition * channels].
void AddUp(const float* parts, int chunks, int stride, int size, int channels, float* out) {
  std::vector<double> sums(channels);
  for (int chunk = 0; chunk < chunks; chunk++)
    for (int begin = 0; begin < size; begin += channels)
      for (int c = 0; c < channels; c++) sums[c] += parts[(size_t)chunk * stride + begin + c];
  for (int c = 0; c < channels; c++) out[c] = sums[c];
}

// Pixels as whole vectors: a line is as many as fill some, so two pixels of 24 channels.
struct Lines {
  int channels, size;  // numbers of a pixel, of a line
  size_t total, step;  // numbers in all, of a chunk
  int count;           // chunks

  template <class A>
  explicit Lines(const A& x)
      : channels(x.dimensions().back()), size(std::lcm(channels, kLanes)), total(x.element_count()),
        step((size_t)std::max(1, kChunk / size) * size), count((total + step - 1) / step) {}

  // The parameters of a line's numbers, one behind the other.
  std::vector<float> Repeat(std::initializer_list<const float*> parameters) const {
    std::vector<float> repeated;
    for (const float* parameter : parameters)
      for (int i = 0; i < size; i++) repeated.push_back(parameter[i % channels]);
    return repeated;
  }

  // visit<V, n>(at, c): the numbers at `at` and in the n - 1 lines below, at `c` of the line, as V.
  template <class F>
  void Visit(int chunk, F visit) const {
    size_t at = chunk * step, end = std::min(total, at + step);
    for (; at + 4 * size <= end; at += 4 * size)
      for (int c = 0; c < size; c += kLanes) visit.template operator()<Wide, 4>(at + c, c);
    for (; at + size <= end; at += size)
      for (int c = 0; c < size; c += kLanes) visit.template operator()<Wide, 1>(at + c, c);
    for (int c = 0; at + c < end; c++) visit.template operator()<float, 1>(at + c, c);
  }
};

template <class E, bool add, bool relu>
void Finish(ffi::ThreadPool& pool, const Lines& lines, const E* x, const float* mean, const float* factor,
            const float* bias, const E* residual, E* y) {
  int size = lines.size;
  std::vector<float> repeated = lines.Repeat({mean, factor, bias});
  const float *means = repeated.data(), *factors = means + size, *biases = factors + size;
  ParallelFor(pool, lines.count, [=](int chunk) {
    lines.Visit(chunk, [=]<class V, int n>(size_t at, int c) {
      V m = Load<V>(means + c), f = Load<V>(factors + c), b = Load<V>(biases + c);
      for (int line = 0; line < n; line++, at += size) {
        V z = (Load<V>(x + at) - m) * f + b;
        if constexpr (add) z += Load<V>(residual + at);
        Store(y + at, relu ? Positive(z) : z);
      }
    });
  });
}

// `gx` and `gresidual` may lie where `y` and `gy` do.
template <class E, bool add, bool relu>
void FinishGradient(ffi::ThreadPool& pool, const Lines& lines, const E* x, const E* y, const float* mean,
                    const float* factor, const float* bias, const E* gy, E* gx, float* gfactor, float* gbias,
                    E* gresidual) {
  int size = lines.size;
  std::vector<float> repeated = lines.Repeat({mean, factor, bias}), sums((size_t)lines.count * 2 * size);
  const float *means = repeated.data(), *factors = means + size, *biases = factors + size;
  float* parts = sums.data();
  ParallelFor(pool, lines.count, [=](int chunk) {
    float *own_bias = parts + (size_t)chunk * 2 * size, *own_factor = own_bias + size;
    lines.Visit(chunk, [=]<class V, int n>(size_t at, int c) {
      V m = Load<V>(means + c), f = Load<V>(factors + c), b = Load<V>(biases + c), sum = {}, products = {};
      for (int line = 0; line < n; line++, at += size) {
        V centred = Load<V>(x + at) - m, g = Load<V>(gy + at);
        if constexpr (relu) {
          V z = centred * f + b;
          if constexpr (add) z = Load<V>(y + at);
          g = z > V{} ? g : V{};
        }
        sum += g;
        products += g * centred;
        Store(gx + at, g * f);
        if constexpr (add && relu) Store(gresidual + at, g);
      }
      Add(own_bias + c, sum);
      Add(own_factor + c, products);
    });
  });
  AddUp(parts, lines.count, 2 * size, size, lines.channels, gbias);
  AddUp(parts + size, lines.count, 2 * size, size, lines.channels, gfactor);
}

// The 2x2 windows of images [B, height, width, channels], rows of them in chunks.
struct Windows {
  int height, width, channels;
  int rows, step, count;  // rows of windows in all, of a chunk; chunks
  size_t corners[4];      // of a window, row by row: how far behind the first

  template <class A>
  explicit Windows(const A& x) : height(x.dimensions()[1]), width(x.dimensions()[2]), channels(x.dimensions()[3]) {
    size_t row = (size_t)width * channels;
    rows = x.dimensions()[0] * (height / 2);
    step = std::max<size_t>(1, kChunk / (2 * row));
    count = (rows + step - 1) / step;
    for (int i = 0; i < 4; i++) corners[i] = i / 2 * row + i % 2 * channels;
  }

  // Where the image row that a row of windows begins with lies.
  size_t begin(int row) const {
    return ((size_t)(row / (height / 2)) * height + row % (height / 2) * 2) * width * channels;
  }

  // Fetches the windows below into the cache. Where two rows are read side by side the processor does so too late: 64
  // channels of 32x32, two cores: forward 0.6 ms, else 1.3; gradient and the next pass over it 2.8, else 3.2.
  template <int write, class E>
  void Fetch(E* at) const {
    for (size_t corner : corners) __builtin_prefetch(at + 2 * corners[2] + corner, write);
  }

  // visit<V>(at, to, c): the windows whose first corners are at `at`, their pooled pixels at `to`, channels c.
  template <class F>
  void Visit(int row, F visit) const {
    size_t at = begin(row), to = (size_t)row * (width / 2) * channels;
    for (int p = 0; p < width / 2; p++, at += 2 * channels, to += channels) {
      int c = 0;
      for (; c + kLanes <= channels; c += kLanes) visit.template operator()<Wide>(at + c, to + c, c);
      for (; c < channels; c++) visit.template operator()<float>(at + c, to + c, c);
    }
  }
};

template <class E, bool relu>
void FinishPool(ffi::ThreadPool& pool, const Windows& windows, const E* x, const float* mean, const float* factor,
                const float* bias, E* y) {
  ParallelFor(pool, windows.count, [=](int chunk) {
    for (int row = chunk * windows.step; row < std::min(windows.rows, (chunk + 1) * windows.step); row++)
      windows.Visit(row, [=]<class V>(size_t at, size_t to, int c) {
        V m = Load<V>(mean + c), f = Load<V>(factor + c), b = Load<V>(bias + c), z[4];
        windows.Fetch<0>(x + at);
        for (int i = 0; i < 4; i++) z[i] = (Load<V>(x + at + windows.corners[i]) - m) * f + b;
        V highest = Higher(Higher(z[0], z[1]), Higher(z[2], z[3]));
        Store(y + to, relu ? Positive(highest) : highest);
      });
  });
}

template <class E, bool relu>
void FinishPoolGradient(ffi::ThreadPool& pool, const Windows& windows, const E* x, const float* mean,
                        const float* factor, const float* bias, const E* gy, E* gx, float* gfactor, float* gbias) {
  int channels = windows.channels, height = windows.height, width = windows.width;
  std::vector<float> sums((size_t)windows.count * 2 * channels);
  float* parts = sums.data();
  ParallelFor(pool, windows.count, [=](int chunk) {
    float *own_bias = parts + (size_t)chunk * 2 * channels, *own_factor = own_bias + channels;
    for (int row = chunk * windows.step; row < std::min(windows.rows, (chunk + 1) * windows.step); row++) {
      windows.Visit(row, [=]<class V>(size_t at, size_t to, int c) {
        V m = Load<V>(mean + c), f = Load<V>(factor + c), b = Load<V>(bias + c), centred[4], z[4];
        windows.Fetch<0>(x + at);
        windows.Fetch<1>(gx + at);
        for (int i = 0; i < 4; i++) {
          centred[i] = Load<V>(x + at + windows.corners[i]) - m;
          z[i] = centred[i] * f + b;
        }
        V highest = Higher(Higher(z[0], z[1]), Higher(z[2], z[3])), g = Load<V>(gy + to), sum = {}, products = {};
        if constexpr (relu) g = highest > V{} ? g : V{};
        for (int i = 0; i < 4; i++) {
          V own = z[i] == highest ? g : V{};
          g = z[i] == highest ? V{} : g;  // the first of equals has taken it
          sum += own;
          products += own * centred[i];
          Store(gx + at + windows.corners[i], own * f);
        }
        Add(own_bias + c, sum);
        Add(own_factor + c, products);
      });
      // No window has the odd last column and row.
      E* first = gx + windows.begin(row);
      size_t line = (size_t)width * channels;
      if (width % 2)
        for (int i = 1; i <= 2; i++) std::fill_n(first + i * line - channels, channels, E{});
      if (height % 2 && row % (height / 2) == height / 2 - 1) std::fill_n(first + 2 * line, line, E{});
    }
  });
  AddUp(parts, windows.count, 2 * channels, channels, channels, gbias);
  AddUp(parts + channels, windows.count, 2 * channels, channels, channels, gfactor);
}

// run<add, relu>()
template <class F>
ffi::Error Dispatch(bool add, bool relu, F run) {
  if (add && relu) run.template operator()<true, true>();
  else if (add) run.template operator()<true, false>();
  else if (relu) run.template operator()<false, true>();
  else run.template operator()<false, false>();
  return ffi::Error::Success();
}

template <class E>
ffi::Error Forward(ffi::ThreadPool pool, bool add, bool relu, ArrayOf<E> x, Array mean, Array factor, Array bias,
                   ArrayOf<E> residual, ResultOf<E> y) {
  return Dispatch(add, relu, [&]<bool kAdd, bool kRelu>() {
    Finish<E, kAdd, kRelu>(pool, Lines(x), Data<E>(x), mean.typed_data(), factor.typed_data(), bias.typed_data(),
                           Data<E>(residual), Data<E>(*y));
  });
}

template <class E>
ffi::Error Backward(ffi::ThreadPool pool, bool add, bool relu, ArrayOf<E> x, ArrayOf<E> y, Array mean, Array factor,
                    Array bias, ArrayOf<E> gy, ResultOf<E> gx, Result gfactor, Result gbias, ResultOf<E> gresidual) {
  return Dispatch(add, relu, [&]<bool kAdd, bool kRelu>() {
    FinishGradient<E, kAdd, kRelu>(pool, Lines(x), Data<E>(x), Data<E>(y), mean.typed_data(), factor.typed_data(),
                                   bias.typed_data(), Data<E>(gy), Data<E>(*gx), gfactor->typed_data(),
                                   gbias->typed_data(), Data<E>(*gresidual));
  });
}

template <class E>
ffi::Error PoolForward(ffi::ThreadPool pool, bool relu, ArrayOf<E> x, Array mean, Array factor, Array bias,
                       ResultOf<E> y) {
  return Dispatch(false, relu, [&]<bool, bool kRelu>() {
    FinishPool<E, kRelu>(pool, Windows(x), Data<E>(x), mean.typed_data(), factor.typed_data(), bias.typed_data(),
                         Data<E>(*y));
  });
}

template <class E>
ffi::Error PoolBackward(ffi::ThreadPool pool, bool relu, ArrayOf<E> x, Array mean, Array factor, Array bias,
                        ArrayOf<E> gy, ResultOf<E> gx, Result gfactor, Result gbias) {
  return Dispatch(false, relu, [&]<bool, bool kRelu>() {
    FinishPoolGradient<E, kRelu>(pool, Windows(x), Data<E>(x), mean.typed_data(), factor.typed_data(),
                                 bias.typed_data(), Data<E>(gy), Data<E>(*gx), gfactor->typed_data(),
                                 gbias->typed_data());
  });
}

}  // namespace

#define HANDLERS(E, suffix)                                                                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(finish_forward##suffix, Forward<E>,                                                \
                                THREADED.Attr<bool>("add").Attr<bool>("relu").Arg<ArrayOf<E>>().Arg<Array>()       \
                                    .Arg<Array>().Arg<Array>().Arg<ArrayOf<E>>().Ret<ArrayOf<E>>());               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(finish_backward##suffix, Backward<E>,                                              \
                                THREADED.Attr<bool>("add").Attr<bool>("relu").Arg<ArrayOf<E>>().Arg<ArrayOf<E>>()  \
                                    .Arg<Array>().Arg<Array>().Arg<Array>().Arg<ArrayOf<E>>().Ret<ArrayOf<E>>()    \
                                    .Ret<Array>().Ret<Array>().Ret<ArrayOf<E>>());                                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(finish_pool_forward##suffix, PoolForward<E>,                                       \
                                THREADED.Attr<bool>("relu").Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>()            \
                                    .Arg<Array>().Ret<ArrayOf<E>>());                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(finish_pool_backward##suffix, PoolBackward<E>,                                     \
                                THREADED.Attr<bool>("relu").Arg<ArrayOf<E>>().Arg<Array>().Arg<Array>()            \
                                    .Arg<Array>().Arg<ArrayOf<E>>().Ret<ArrayOf<E>>().Ret<Array>().Ret<Array>())

HANDLERS(float, );
HANDLERS(BFloat16, _bf16);

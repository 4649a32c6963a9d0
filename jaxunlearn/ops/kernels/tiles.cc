// Convolution of bfloat16 by the processor's tiles (AMX), where it has them: any odd kernel, 1x1 too, of channels and
// features that are multiples of 8.

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)

#include "tiles_gradient.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

using HalfArray = ArrayOf<BFloat16>;

// Of a kernel's gradient, that are added to while a block stays in the second cache. 256 channels of 8x8 images,
// backward: 13.7 ms; of two at a time, 18.0.
constexpr int kParts = 8;

// Stores `count` pixels of sums, rounded, `apart` floats from one to the next; adds up their deviations from `shift`.
template <bool kWhole>
inline void StoreAndSum(const float* sums, int apart, int count, int features, int lanes, BFloat16* y, Vec16 shift,
                        float* totals, float* squares) {
  Vec16 total[2] = {Load<Vec16>(totals), {}}, square[2] = {Load<Vec16>(squares), {}};
  for (int i = 0; i < count; i++, sums += apart, y += features) {
    Half16 half = Rounded(Load<Vec16>(sums));
    if (kWhole) std::memcpy(y, &half, sizeof(half));
    else StoreHalves<Vec16>(y, half, lanes);
    Vec16 deviation = Widened<Vec16>(half) - shift;
    total[i % 2] += deviation;
    square[i % 2] += deviation * deviation;
  }
  Store(totals, total[0] + total[1]);
  Store(squares, square[0] + square[1]);
}

// Of the first strip, rounded like what is stored: near enough to all pixels' mean for sums of squares to be safe.
inline Vec16 FirstMean(const Flat& flat, int images, const float* sums, int apart) {
  Vec16 total = {};
  int count = 0;
  flat.Results(0, kStrip, images, [&](int first, int pixels, size_t) {
    for (int i = first; i < first + pixels; i++) total += Load<Vec16>(sums + i * apart);
    count += pixels;
  });
  return Kept<BFloat16>(total / (float)count);
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t stride, int64_t reading, HalfArray x, Array mean, Array factor,
                   Array bias, Array kernel, ResultOf<BFloat16> y, Result ymean, Result yvar) {
  Flat flat(x.dimensions(), y->dimensions(), kernel.dimensions()[0], stride);
  int channels = flat.in.channels, features = flat.out.channels, lanes = Padded(features);
  Reading read(reading, channels, mean, factor, bias);
  Packed packed(flat.Forward(), channels, features);
  uint32_t* words = Scratch<uint32_t>(0, packed.size());
  Pack(pool, packed, flat, kernel.typed_data(), words);
  const BFloat16* images = Data<const BFloat16>(x);
  BFloat16* results = Data<BFloat16>(*y);
  std::vector<float> all((size_t)flat.blocks() * 2 * lanes);
  ParallelFor(pool, flat.blocks(), [=, &flat, &read, &packed, moments = all.data()](int block) FLAT {
    Tiles tiles;
    int count = flat.images(block);
    size_t plane = (size_t)flat.kept() * channels;
    BFloat16* z = Scratch<BFloat16>(1, flat.planes() * plane);
    ArrangeInput(flat, count, read, images + block * flat.together * flat.in.image(), z);
    BFloat16* to = results + block * flat.together * flat.out.image();
    float *totals = moments + (size_t)2 * block * lanes, *squares = totals + lanes;
    float* shifts = Scratch(2, lanes + kStrip * 32);
    float* sums = shifts + lanes;
    ForStrips(flat, packed, [&](int at, int panel) {
      int together = std::min(2, packed.panels() - panel), apart = together * 16;
      Multiply(packed, panel, words, z + (size_t)at * channels, plane, sums);
      if (at == 0)
        for (int n = 0; n < together; n++)
          Store(shifts + 16 * (panel + n), FirstMean(flat, count, sums + 16 * n, apart));
      flat.Results(at, at + kStrip, count, [&](int first, int pixels, size_t pixel) {
        for (int n = 0; n < together; n++) {
          int f = 16 * (panel + n);
          auto store = [&]<bool kWhole>() {
            StoreAndSum<kWhole>(sums + (first - at) * apart + 16 * n, apart, pixels, features, features - f,
                                to + pixel * features + f, Load<Vec16>(shifts + f), totals + f, squares + f);
          };
          if (f + 16 <= features) store.template operator()<true>();
          else store.template operator()<false>();
        }
      });
    });
    for (int f = 0; f < lanes; f++) Centre(shifts[f], flat.pixels(count), totals[f], squares[f]);
  });
  MergeMoments(flat.blocks(), [&](int block) { return flat.pixels(flat.images(block)); }, all.data(), lanes, features,
               ymean->typed_data(), yvar->typed_data());
  return ffi::Error::Success();
}

// Stores `count` pixels, `apart` floats and `to_apart` numbers from one to the next, of the gradient for x, and adds
// those of factor and bias.
template <bool kWhole>
inline void StoreInputGradient(const float* sums, int apart, int count, int to_apart, int lanes,
                               const Reading& read, const Normal<Vec16>& normal, const BFloat16* x, BFloat16* gx,
                               float* gfactor, float* gbias) {
  Vec16 factors[2] = {Load<Vec16>(gfactor), {}}, biases[2] = {Load<Vec16>(gbias), {}};
  for (int i = 0; i < count; i++, sums += apart, x += to_apart, gx += to_apart) {
    Vec16 value = Load<Vec16>(sums);
    if (read.any) {
      Vec16 centred = (kWhole ? Load<Vec16>(x) : LoadSome<Vec16>(x, lanes)) - normal.mean;
      value = normal.Through(value, centred);
      biases[i % 2] += value;
      factors[i % 2] += value * centred;
      value *= normal.factor;
    }
    if (kWhole) Store(gx, value);
    else StoreSome(gx, value, lanes);
  }
  Store(gfactor, factors[0] + factors[1]);
  Store(gbias, biases[0] + biases[1]);
}

ffi::Error Backward(ffi::ThreadPool pool, int64_t stride, int64_t reading, HalfArray x, Array mean, Array factor,
                    Array bias, Array kernel, HalfArray y, Array ymean, HalfArray gy, Array gmean, Array gvar,
                    ResultOf<BFloat16> gx, Result gfactor, Result gbias, Result gkernel) {
  Flat flat(x.dimensions(), y.dimensions(), kernel.dimensions()[0], stride);
  int channels = flat.in.channels, features = flat.out.channels, lanes = Padded(channels);
  Reading read(reading, channels, mean, factor, bias);
  OutputGradient gradient(flat.pixels(flat.batch), ymean, gmean, gvar);
  std::vector<Packed> packed;
  std::vector<size_t> begins;
  size_t size = 0;
  for (int plane = 0; plane < flat.planes(); plane++) {
    packed.emplace_back(flat.Backward(plane), features, channels);
    begins.push_back(size);
    size += packed.back().size();
  }
  uint32_t* words = Scratch<uint32_t>(0, size);
  for (int plane = 0; plane < flat.planes(); plane++)
    PackTurned(pool, packed[plane], flat, kernel.typed_data(), words + begins[plane]);
  // Each group of blocks adds up a gradient of its own where that is small beside the images. Else the images are
  // kept for a second visit that divides the kernel.
  Turned turned{flat};
  bool own = kGroups * turned.kernel() <= flat.batch * (flat.in.image() + flat.out.image());
  uint32_t* kept = own ? nullptr : Scratch<uint32_t>(3, flat.blocks() * turned.bytes() / sizeof(uint32_t));
  BFloat16* kept_g = own ? nullptr : (BFloat16*)(kept + flat.blocks() * turned.input());
  const BFloat16 *xs = Data<const BFloat16>(x), *ys = Data<const BFloat16>(y), *gys = Data<const BFloat16>(gy);
  BFloat16* out = Data<BFloat16>(*gx);
  std::vector<float> all(2 * lanes + (own ? turned.kernel() : 0));
  SumOfGroups(pool, all.size(), all.data(), [&, own, kept, kept_g](int group, float* totals) FLAT {
    Tiles tiles;
    float sums[kStrip * 32];
    for (int block = group; block < flat.blocks(); block += kGroups) {
      int count = flat.images(block);
      size_t plane = (size_t)flat.kept() * channels, first = block * flat.together * flat.in.image();
      uint32_t* z2 = own ? Scratch<uint32_t>(2, turned.bytes() / sizeof(uint32_t)) : kept + block * turned.input();
      BFloat16* g2 = own ? (BFloat16*)(z2 + turned.input()) : kept_g + block * turned.gradient();
      size_t lead = (size_t)flat.reach * features;
      BFloat16* z = Scratch<BFloat16>(1, std::max(flat.planes() * plane, lead + (size_t)flat.kept() * features));
      ArrangeInput(flat, count, read, xs + first, z);
      turned.Arrange(z, z2);
      BFloat16* g = z + lead;  // in the same place, where the input is not needed any more
      size_t second = block * flat.together * flat.out.image();
      ArrangeGradient(flat, count, gradient, ys + second, gys + second, z);
      TransposePixels(g, flat.line(), features, turned.apart(), g2);
      for (int p = 0; p < flat.planes(); p++)
        ForStrips(flat, packed[p], [&](int at, int panel) {
          int together = std::min(2, packed[p].panels() - panel), apart = together * 16;
          Multiply(packed[p], panel, words + begins[p], g + (size_t)at * features, 0, sums);
          flat.Inputs(p, at, at + kStrip, count, [&](int from, int pixels, size_t pixel) {
            for (int n = 0; n < together; n++) {
              int c = 16 * (panel + n);
              auto put = [&]<bool kWhole>() {
                StoreInputGradient<kWhole>(sums + (from - at) * apart + 16 * n, apart, pixels, flat.stride * channels,
                                           channels - c, read, read.At<Vec16>(c), xs + first + pixel * channels + c,
                                           out + first + pixel * channels + c, totals + c, totals + lanes + c);
              };
              if (c + 16 <= channels) put.template operator()<true>();
              else put.template operator()<false>();
            }
          });
        });
      if (own) AddKernelGradient(turned, 0, turned.parts(), z2, g2, totals + 2 * lanes);
    }
  });
  read.Put(&all[0], &all[lanes], channels, gfactor->typed_data(), gbias->typed_data());
  std::vector<float> padded(own ? 0 : turned.kernel());
  float* sum = own ? all.data() + 2 * lanes : padded.data();
  if (!own)
    ParallelFor(pool, (turned.parts() + kParts - 1) / kParts, [=, &flat, &turned](int i) FLAT {
      Tiles tiles;
      int first = i * kParts, count = std::min(kParts, turned.parts() - first);
      for (int block = 0; block < flat.blocks(); block++)
        AddKernelGradient(turned, first, count, kept + block * turned.input(), kept_g + block * turned.gradient(),
                          sum + (size_t)first * 16 * turned.features());
    });
  Unpack(pool, turned, sum, gkernel->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(tiles_forward_bf16, Forward, FORWARD(BFloat16));
XLA_FFI_DEFINE_HANDLER_SYMBOL(tiles_backward_bf16, Backward, BACKWARD(BFloat16));

// Whether this process may use the tiles: Linux gives their registers to those that ask.
extern "C" int tiles_allowed() {
  constexpr int kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}

#endif

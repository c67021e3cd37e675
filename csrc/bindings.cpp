// lowbit.kernels._core: the kernels on arrays that cross by DLPack.
//
// Every function writes into an array of the caller's, checks all shapes first (the kernels trust them), and runs
// without the GIL. No array is converted: a wrong dtype or layout is a TypeError. Kernels are single-threaded and
// reentrant; callers split rows over threads.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>

#include "dispatch.hpp"
#include "ggml/ggml.hpp"
#include "ggml/iq_grid.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace lowbit {
namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyMatrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

template <class A, class B>
void require_same_shape(const A& a, const B& b, const char* what) {
    require(a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1), what);
}

Weights weights_of(const AnyMatrix& w, std::size_t group) {
    require(group > 0, "group size must be positive");
    const auto dtype = w.dtype();
    FloatType type = FloatType::float32;
    if (dtype == nb::dtype<float>())
        type = FloatType::float32;
    else if (dtype.code == std::uint8_t(nb::dlpack::dtype_code::Bfloat) && dtype.bits == 16)
        type = FloatType::bfloat16;
    else if (dtype.code == std::uint8_t(nb::dlpack::dtype_code::Float) && dtype.bits == 16)
        type = FloatType::float16;
    else
        throw nb::type_error("weights must be float32, bfloat16 or float16");
    return {w.data(), type, w.shape(0), w.shape(1), group};
}

template <class T>
Codes codes_of(const Matrix<T>& codes, std::size_t group) {
    require(group > 0, "group size must be positive");
    return {codes.data(), codes.shape(0), codes.shape(1), group};
}

// [N, G] for a matrix of N rows and K columns in groups of g
template <class T, class Cut>
void require_per_group(const Matrix<T>& values, const Cut& cut, const char* what) {
    require(values.shape(0) == cut.rows && values.shape(1) == (cut.columns + cut.group - 1) / cut.group, what);
}

using Scales = Matrix<const float>;
using ZeroPoints = std::optional<Matrix<const std::int32_t>>;
using Importance = std::optional<Vector<const float>>;

template <class Cut>
Affine affine_of(const Scales& scale, const ZeroPoints& zero_point, const Cut& cut, int qmin, int qmax) {
    require_per_group(scale, cut, "scale must be [N, G]");
    if (zero_point) require_per_group(*zero_point, cut, "zero_point must be [N, G]");
    return {scale.data(), zero_point ? zero_point->data() : nullptr, qmin, qmax};
}

// exponent bits, mantissa bits, bias, largest finite value
using FormatFields = std::tuple<int, int, int, float>;

Minifloat minifloat_of(const Scales& scale, const FormatFields& fields, const Weights& weights) {
    require_per_group(scale, weights, "scale must be [N, G]");
    const auto& [exponent_bits, mantissa_bits, bias, max_value] = fields;
    require(exponent_bits > 0 && mantissa_bits > 0 && exponent_bits + mantissa_bits < 8, "minifloats have 3 to 8 bits");
    return {scale.data(), exponent_bits, mantissa_bits, bias, max_value};
}

Codebook codebook_of(const Scales& scale, const Vector<const float>& midpoints, const Vector<const float>& values,
                     const Vector<const std::uint8_t>& codes, const Weights& weights) {
    require_per_group(scale, weights, "scale must be [N, G]");
    require(midpoints.shape(0) == 15 && values.shape(0) == 16 && codes.shape(0) == 16, "codebooks have 16 values");
    return {scale.data(), midpoints.data(), values.data(), codes.data()};
}

const float* importance_of(const Importance& importance, const Weights& weights) {
    if (!importance) return nullptr;
    require(importance->shape(0) == weights.columns, "importance must be [K]");
    return importance->data();
}

const float* table_of(const Vector<const float>& values) {
    require(values.shape(0) == 256, "the value table must have an entry for every byte");
    return values.data();
}

template <class Code>
Feedback feedback_of(const Matrix<float>& w, const Matrix<const float>& spread, std::size_t begin, std::size_t end,
                     std::size_t block, const Scales& scale, bool descend, const Matrix<Code>& codes,
                     const Matrix<float>& decoded) {
    require(spread.shape(0) == w.shape(1) && spread.shape(1) == w.shape(1), "spread must be [K, K]");
    require(begin <= end && end <= w.shape(1), "columns must lie within the weight");
    require(block > 0, "a block must have columns");
    require_same_shape(scale, w, "scale must be [N, K]");
    require_same_shape(codes, w, "codes must be [N, K]");
    require_same_shape(decoded, w, "decoded must be [N, K]");
    return {w.data(),     spread.data(), w.shape(0), w.shape(1), begin, end, block, descend,
            scale.data(), nullptr,       nullptr,    reinterpret_cast<std::uint8_t*>(codes.data()), decoded.data()};
}

nb::tuple as_tuple(const SquaredError& e) { return nb::make_tuple(e.error, e.weight, e.max_abs_error); }

// One instruction set, as a Python object whose methods are the kernels.
struct Isa {
    const Kernels* kernels;

    void group_range(const AnyMatrix& w, std::size_t group, const Matrix<float>& low, const Matrix<float>& high) const {
        const Weights weights = weights_of(w, group);
        require_per_group(low, weights, "low must be [N, G]");
        require_per_group(high, weights, "high must be [N, G]");
        const nb::gil_scoped_release unlocked;
        kernels->group_range(weights, low.data(), high.data());
    }

    void round_int(const AnyMatrix& w, std::size_t group, const Scales& scale, const ZeroPoints& zero_point, int qmin,
                   int qmax, const Matrix<std::int8_t>& codes) const {
        const Weights weights = weights_of(w, group);
        const Affine affine = affine_of(scale, zero_point, weights, qmin, qmax);
        require_same_shape(w, codes, "codes must be [N, K]");
        const nb::gil_scoped_release unlocked;
        kernels->round_int(weights, affine, codes.data());
    }

    void round_minifloat(const AnyMatrix& w, std::size_t group, const Scales& scale, const FormatFields& format,
                         const Matrix<std::uint8_t>& codes) const {
        const Weights weights = weights_of(w, group);
        const Minifloat minifloat = minifloat_of(scale, format, weights);
        require_same_shape(w, codes, "codes must be [N, K]");
        const nb::gil_scoped_release unlocked;
        kernels->round_minifloat(weights, minifloat, codes.data());
    }

    void round_codebook(const AnyMatrix& w, std::size_t group, const Scales& scale,
                        const Vector<const float>& midpoints, const Vector<const float>& values,
                        const Vector<const std::uint8_t>& code_of, const Matrix<std::uint8_t>& codes) const {
        const Weights weights = weights_of(w, group);
        const Codebook book = codebook_of(scale, midpoints, values, code_of, weights);
        require_same_shape(w, codes, "codes must be [N, K]");
        const nb::gil_scoped_release unlocked;
        kernels->round_codebook(weights, book, codes.data());
    }

    void decode_int(const Matrix<const std::int8_t>& codes, std::size_t group, const Scales& scale,
                    const ZeroPoints& zero_point, const Matrix<float>& weights) const {
        const Codes in = codes_of(codes, group);
        const Affine affine = affine_of(scale, zero_point, in, 0, 0);
        require_same_shape(codes, weights, "weights must be [N, K]");
        const nb::gil_scoped_release unlocked;
        kernels->decode_int(in, affine, weights.data());
    }

    void decode_table(const Matrix<const std::uint8_t>& codes, std::size_t group, const Scales& scale,
                      const Vector<const float>& values, const Matrix<float>& weights) const {
        const Codes in = codes_of(codes, group);
        require_per_group(scale, in, "scale must be [N, G]");
        require_same_shape(codes, weights, "weights must be [N, K]");
        const float* table = table_of(values);
        const nb::gil_scoped_release unlocked;
        kernels->decode_table(in, scale.data(), table, weights.data());
    }

    void error_int(const AnyMatrix& w, std::size_t group, const Scales& scale, const ZeroPoints& zero_point, int qmin,
                   int qmax, const Importance& importance, bool by_magnitude, const Matrix<float>& errors) const {
        const Weights weights = weights_of(w, group);
        const Affine affine = affine_of(scale, zero_point, weights, qmin, qmax);
        require_per_group(errors, weights, "errors must be [N, G]");
        const ErrorWeights by{importance_of(importance, weights), by_magnitude};
        const nb::gil_scoped_release unlocked;
        kernels->error_int(weights, affine, by, errors.data());
    }

    void error_minifloat(const AnyMatrix& w, std::size_t group, const Scales& scale, const FormatFields& format,
                         const Importance& importance, bool by_magnitude, const Matrix<float>& errors) const {
        const Weights weights = weights_of(w, group);
        const Minifloat minifloat = minifloat_of(scale, format, weights);
        require_per_group(errors, weights, "errors must be [N, G]");
        const ErrorWeights by{importance_of(importance, weights), by_magnitude};
        const nb::gil_scoped_release unlocked;
        kernels->error_minifloat(weights, minifloat, by, errors.data());
    }

    void error_codebook(const AnyMatrix& w, std::size_t group, const Scales& scale,
                        const Vector<const float>& midpoints, const Vector<const float>& values,
                        const Vector<const std::uint8_t>& code_of, const Importance& importance, bool by_magnitude,
                        const Matrix<float>& errors) const {
        const Weights weights = weights_of(w, group);
        const Codebook book = codebook_of(scale, midpoints, values, code_of, weights);
        require_per_group(errors, weights, "errors must be [N, G]");
        const ErrorWeights by{importance_of(importance, weights), by_magnitude};
        const nb::gil_scoped_release unlocked;
        kernels->error_codebook(weights, book, by, errors.data());
    }

    nb::tuple squared_error_int(const AnyMatrix& w, const Matrix<const std::int8_t>& codes, std::size_t group,
                                const Scales& scale, const ZeroPoints& zero_point) const {
        const Weights weights = weights_of(w, group);
        const Affine affine = affine_of(scale, zero_point, weights, 0, 0);
        require_same_shape(w, codes, "codes must be [N, K]");
        SquaredError result{};
        {
            const nb::gil_scoped_release unlocked;
            result = kernels->squared_error_int(weights, codes_of(codes, group), affine);
        }
        return as_tuple(result);
    }

    nb::tuple squared_error_table(const AnyMatrix& w, const Matrix<const std::uint8_t>& codes, std::size_t group,
                                  const Scales& scale, const Vector<const float>& values) const {
        const Weights weights = weights_of(w, group);
        require_per_group(scale, weights, "scale must be [N, G]");
        require_same_shape(w, codes, "codes must be [N, K]");
        const float* table = table_of(values);
        SquaredError result{};
        {
            const nb::gil_scoped_release unlocked;
            result = kernels->squared_error_table(weights, codes_of(codes, group), scale.data(), table);
        }
        return as_tuple(result);
    }

    void pack_dense(const Matrix<const std::uint8_t>& codes, int bits, int offset,
                    const Matrix<std::int32_t>& words) const {
        require_word_shape(words.shape(0), words.shape(1), codes.shape(0), codes.shape(1), bits);
        bool fits = false;
        {
            const nb::gil_scoped_release unlocked;
            fits =
                kernels->pack_dense(codes_of(codes, 1), bits, offset, reinterpret_cast<std::uint32_t*>(words.data()));
        }
        require(fits, "a code does not fit in its bits");
    }

    void unpack_dense(const Matrix<const std::int32_t>& words, int bits, int offset,
                      const Matrix<std::uint8_t>& codes) const {
        require_word_shape(words.shape(0), words.shape(1), codes.shape(0), codes.shape(1), bits);
        const nb::gil_scoped_release unlocked;
        kernels->unpack_dense(reinterpret_cast<const std::uint32_t*>(words.data()), codes.shape(0), codes.shape(1),
                              bits, offset, codes.data());
    }

    void subtract_product(const Matrix<float>& w, const Matrix<const float>& change, const Matrix<const float>& spread,
                          std::size_t begin, std::size_t end) const {
        require(change.shape(0) == w.shape(0) && spread.shape(0) == change.shape(1) && spread.shape(1) == w.shape(1),
                "change must be [N, B], spread [B, K]");
        require(begin <= end && end <= w.shape(1), "columns must lie within the weight");
        const nb::gil_scoped_release unlocked;
        kernels->subtract_product({w.data(), change.data(), spread.data(), w.shape(0), w.shape(1), change.shape(1),
                                   begin, end});
    }

    void feedback_int(const Matrix<float>& w, const Matrix<const float>& spread, std::size_t begin, std::size_t end,
                      std::size_t block, const Scales& scale, const std::optional<Scales>& offset,
                      const ZeroPoints& zero_point, int qmin, int qmax, bool descend,
                      const Matrix<std::int8_t>& codes, const Matrix<float>& decoded) const {
        Feedback f = feedback_of(w, spread, begin, end, block, scale, descend, codes, decoded);
        if (offset) require_same_shape(*offset, w, "offset must be [N, K]");
        if (zero_point) require_same_shape(*zero_point, w, "zero_point must be [N, K]");
        require(qmin >= -128 && qmax <= 127 && qmin <= qmax, "codes must fit in a byte");
        f.offset = offset ? offset->data() : nullptr;
        f.zero_point = zero_point ? zero_point->data() : nullptr;
        const nb::gil_scoped_release unlocked;
        kernels->feedback_int(f, qmin, qmax);
    }

    void feedback_minifloat(const Matrix<float>& w, const Matrix<const float>& spread, std::size_t begin,
                            std::size_t end, std::size_t block, const Scales& scale, const FormatFields& format,
                            bool descend, const Matrix<std::uint8_t>& codes, const Matrix<float>& decoded) const {
        const Feedback f = feedback_of(w, spread, begin, end, block, scale, descend, codes, decoded);
        const Weights weights{w.data(), FloatType::float32, w.shape(0), w.shape(1), 1};
        const Minifloat minifloat = minifloat_of(scale, format, weights);
        const nb::gil_scoped_release unlocked;
        kernels->feedback_minifloat(f, minifloat);
    }

    void feedback_codebook(const Matrix<float>& w, const Matrix<const float>& spread, std::size_t begin,
                           std::size_t end, std::size_t block, const Scales& scale,
                           const Vector<const float>& midpoints, const Vector<const float>& values,
                           const Vector<const std::uint8_t>& code_of, bool descend,
                           const Matrix<std::uint8_t>& codes, const Matrix<float>& decoded) const {
        const Feedback f = feedback_of(w, spread, begin, end, block, scale, descend, codes, decoded);
        const Weights weights{w.data(), FloatType::float32, w.shape(0), w.shape(1), 1};
        const Codebook book = codebook_of(scale, midpoints, values, code_of, weights);
        const nb::gil_scoped_release unlocked;
        kernels->feedback_codebook(f, book);
    }

    const GgmlCodec& ggml_codec(int type) const {
        const GgmlCodecs codecs = kernels->ggml_codecs();
        for (std::size_t i = 0; i < codecs.count; ++i)
            if (codecs.first[i].type == type) return codecs.first[i];
        throw std::invalid_argument("no codec for this ggml type");
    }

    std::vector<int> ggml_types() const {
        const GgmlCodecs codecs = kernels->ggml_codecs();
        std::vector<int> types;
        for (std::size_t i = 0; i < codecs.count; ++i) types.push_back(codecs.first[i].type);
        return types;
    }

    void ggml_decode(int type, const Matrix<const std::uint8_t>& blocks, const Matrix<float>& weights) const {
        const GgmlCodec& codec = ggml_codec(type);
        require(blocks.shape(0) == weights.shape(0) && blocks.shape(1) % codec.bytes == 0 &&
                    blocks.shape(1) / codec.bytes * codec.weights == weights.shape(1),
                "blocks must be [N, K / block * bytes]");
        const nb::gil_scoped_release unlocked;
        codec.decode(blocks.data(), blocks.shape(0) * blocks.shape(1) / codec.bytes, weights.data());
    }

    nb::tuple ggml_encode(int type, const AnyMatrix& w, const Importance& importance,
                          const Matrix<std::uint8_t>& blocks) const {
        const GgmlCodec& codec = ggml_codec(type);
        const Weights weights = weights_of(w, codec.weights);
        require(codec.encode != nullptr, "this ggml type cannot be encoded");
        require(weights.columns % codec.weights == 0 && blocks.shape(0) == weights.rows &&
                    blocks.shape(1) == weights.columns / codec.weights * codec.bytes,
                "blocks must be [N, K / block * bytes]");
        const GgmlRows rows{weights, importance_of(importance, weights)};
        SquaredError result{};
        {
            const nb::gil_scoped_release unlocked;
            result = kernels->ggml_encode(codec, rows, blocks.data());
        }
        return as_tuple(result);
    }

    nb::tuple ggml_error(int type, const AnyMatrix& w, const Matrix<const std::uint8_t>& blocks) const {
        const GgmlCodec& codec = ggml_codec(type);
        const Weights weights = weights_of(w, codec.weights);
        require(weights.columns % codec.weights == 0 && blocks.shape(0) == weights.rows &&
                    blocks.shape(1) == weights.columns / codec.weights * codec.bytes,
                "blocks must be [N, K / block * bytes]");
        SquaredError result{};
        {
            const nb::gil_scoped_release unlocked;
            result = kernels->ggml_error(codec, weights, blocks.data());
        }
        return as_tuple(result);
    }

    void iq_nearest(int type, const Matrix<const float>& x, const Matrix<const float>& w,
                    const Matrix<const float>& scaled, const Vector<std::int32_t>& entry,
                    const Vector<float>& cost) const {
        const IqGrid& grid = iq_grid(type);
        require(x.shape(1) == grid.columns && scaled.shape(1) == grid.levels, "x must be [V, columns], scaled [V, L]");
        require_same_shape(x, w, "w must be [V, columns]");
        require(scaled.shape(0) == x.shape(0) && entry.shape(0) == x.shape(0) && cost.shape(0) == x.shape(0),
                "entry and cost must be [V]");
        const nb::gil_scoped_release unlocked;
        kernels->iq_nearest(type, {x.data(), w.data(), scaled.data(), x.shape(0)}, entry.data(), cost.data());
    }

    void iq_round(int type, const Matrix<const float>& x, const Matrix<const float>& w, const Vector<const float>& scale,
                  const Vector<std::int32_t>& codes) const {
        // IQ3_XXS has two points of four columns in a code.
        require(x.shape(1) == (type == 18 ? 8 : iq_grid(type).columns), "x must be [V, columns of a code]");
        require_same_shape(x, w, "w must be [V, columns]");
        require(scale.shape(0) == x.shape(0) && codes.shape(0) == x.shape(0), "scale and codes must be [V]");
        bool known = false;
        {
            const nb::gil_scoped_release unlocked;
            known = kernels->iq_round(type, {x.data(), w.data(), scale.data(), x.shape(0)}, codes.data());
        }
        require(known, "this ggml type has no signs");
    }

    static void require_word_shape(std::size_t word_rows, std::size_t words, std::size_t rows, std::size_t columns,
                                   int bits) {
        require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
        require(word_rows == rows && words == (columns * std::size_t(bits) + 31) / 32,
                "words must be [N, ceil(K * bits / 32)]");
    }
};

void set_ggml_grid(int type, const Matrix<const std::int8_t>& points) {
    set_iq_grid(type, points.data(), points.shape(0), points.shape(1));
}

std::vector<std::string> available_names() {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->isa);
    return names;
}

}  // namespace
}  // namespace lowbit

NB_MODULE(_core, module) {
    using namespace lowbit;
    module.doc() = "Compiled kernels; see lowbit.kernels for what each computes.";
    module.def("available_isas", &available_names, "Instruction sets built in and usable on this machine, best first.");

    // noconvert everywhere: a silently converted output array would lose the result.
    const auto w = "w"_a.noconvert(), codes = "codes"_a.noconvert(), scale = "scale"_a.noconvert();
    const auto zero_point = "zero_point"_a.noconvert().none(), importance = "importance"_a.noconvert().none();
    const auto values = "values"_a.noconvert(), words = "words"_a.noconvert(), errors = "errors"_a.noconvert();
    const auto weights = "weights"_a.noconvert(), low = "low"_a.noconvert(), high = "high"_a.noconvert();

    const auto blocks = "blocks"_a.noconvert(), decoded = "decoded"_a.noconvert();
    const auto change = "change"_a.noconvert(), spread = "spread"_a.noconvert();
    const auto offset = "offset"_a.noconvert().none();
    const auto midpoints = "midpoints"_a.noconvert(), code_of = "code_of"_a.noconvert();

    nb::class_<Isa>(module, "Isa", "The kernels of one instruction set; the last argument of most is the output.")
        .def(
            "__init__", [](Isa* self, const std::string& name) { new (self) Isa{&kernels_named(name)}; }, "name"_a)
        .def_prop_ro("name", [](const Isa& self) { return std::string(self.kernels->isa); })
        .def("group_range", &Isa::group_range, w, "group"_a, low, high)
        .def("round_int", &Isa::round_int, w, "group"_a, scale, zero_point, "qmin"_a, "qmax"_a, codes)
        .def("round_minifloat", &Isa::round_minifloat, w, "group"_a, scale, "format"_a, codes)
        .def("round_codebook", &Isa::round_codebook, w, "group"_a, scale, midpoints, values, code_of, codes)
        .def("decode_int", &Isa::decode_int, codes, "group"_a, scale, zero_point, weights)
        .def("decode_table", &Isa::decode_table, codes, "group"_a, scale, values, weights)
        .def("error_int", &Isa::error_int, w, "group"_a, scale, zero_point, "qmin"_a, "qmax"_a, importance, "by_magnitude"_a, errors)
        .def("error_minifloat", &Isa::error_minifloat, w, "group"_a, scale, "format"_a, importance, "by_magnitude"_a, errors)
        .def("error_codebook", &Isa::error_codebook, w, "group"_a, scale, midpoints, values, code_of, importance, "by_magnitude"_a, errors)
        .def("squared_error_int", &Isa::squared_error_int, w, codes, "group"_a, scale, zero_point)
        .def("squared_error_table", &Isa::squared_error_table, w, codes, "group"_a, scale, values)
        .def("pack_dense", &Isa::pack_dense, codes, "bits"_a, "offset"_a, words)
        .def("unpack_dense", &Isa::unpack_dense, words, "bits"_a, "offset"_a, codes)
        .def("subtract_product", &Isa::subtract_product, w, change, spread, "begin"_a, "end"_a)
        .def("feedback_int", &Isa::feedback_int, w, spread, "begin"_a, "end"_a, "block"_a, scale, offset, zero_point, "qmin"_a, "qmax"_a, "descend"_a, codes, decoded)
        .def("feedback_minifloat", &Isa::feedback_minifloat, w, spread, "begin"_a, "end"_a, "block"_a, scale, "format"_a, "descend"_a, codes, decoded)
        .def("feedback_codebook", &Isa::feedback_codebook, w, spread, "begin"_a, "end"_a, "block"_a, scale, midpoints, values, code_of, "descend"_a, codes, decoded)
        .def("ggml_error", &Isa::ggml_error, "type"_a, w, blocks)
        .def_static("set_ggml_grid", &set_ggml_grid, "type"_a, "points"_a.noconvert(),
                    "The vector codebook [entries, columns] of a ggml type, before its blocks are touched.")
        .def("iq_nearest", &Isa::iq_nearest, "type"_a, "x"_a.noconvert(), w, "scaled"_a.noconvert(), "entry"_a.noconvert(), "cost"_a.noconvert())
        .def("iq_round", &Isa::iq_round, "type"_a, "x"_a.noconvert(), w, scale, codes)
        .def("ggml_types", &Isa::ggml_types)
        .def("ggml_decode", &Isa::ggml_decode, "type"_a, blocks, weights)
        .def("ggml_encode", &Isa::ggml_encode, "type"_a, w, importance, blocks);
}

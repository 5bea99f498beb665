// Reads torch's tensors without torch's headers: through the table of C functions that torch.Tensor holds for libraries
// that exchange tensors (DLPack 1, `__dlpack_c_exchange_api__`). Reading one takes some 30 ns, where asking it for its
// shape, dtype, device, strides and address in Python takes several hundred.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "api.h"

namespace py = pybind11;

namespace {

// DLTensor of DLPack 1. Shape and strides belong to the tensor.
struct TensorView {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;

  bool is_int64() const { return kind == 0 && bits == 64; }
  // kF32 or kBF16; -1 for others, which the kernels do not take.
  int dtype() const { return kind == 2 && bits == 32 ? ttt::kF32 : kind == 4 && bits == 16 ? ttt::kBF16 : -1; }
  bool is_float32() const { return dtype() == ttt::kF32; }

  bool has_numbers() const {
    for (int d = 0; d < dims; d++)
      if (shape[d] == 0) return false;
    return true;
  }

  bool has_shape(std::initializer_list<int64_t> sizes) const {
    if (dims != static_cast<int32_t>(sizes.size())) return false;
    const int64_t* size = shape;
    for (const int64_t wanted : sizes)
      if (*size++ != wanted) return false;
    return true;
  }

  // Whether the dimensions from `first` on lie in memory one number after the other; of no numbers, any do.
  bool is_dense(int first = 0) const {
    int64_t expected = 1;
    bool dense = true;
    for (int d = dims - 1; d >= first; d--) {
      dense = dense && (shape[d] == 1 || strides[d] == expected);
      expected *= shape[d];
    }
    return dense || expected == 0;
  }
};

// DLPackExchangeAPI of DLPack 1; only one of its functions is called here.
struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  int (*view_of_object)(void* object, TensorView* view);
  void* current_stream;
};

class TensorReader {
 public:
  // Tensors of these two types are read from now on: torch.Tensor and torch.nn.Parameter. They are never freed. The
  // result is empty, or the reason why no tensor can be read: other versions of torch may have another table or none.
  static std::string use(const py::object& tensor, const py::object& parameter) {
    api_ = nullptr;
    const char* table = "__dlpack_c_exchange_api__";
    if (!py::hasattr(tensor, table)) return std::string("torch.Tensor has no ") + table;
    const py::object capsule = tensor.attr(table);
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return std::string(table) + " holds no known table";
    const auto* found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found->major != 1 || found->view_of_object == nullptr) return std::string(table) + " has an unknown version";
    tensor_ = reinterpret_cast<PyTypeObject*>(tensor.ptr());
    parameter_ = reinterpret_cast<PyTypeObject*>(parameter.ptr());
    is_negative_ = py::object(tensor.attr("is_neg")).release().ptr();
    api_ = found;
    return "";
  }

  // Whether `object` is a tensor on the CPU and of no subclass; `view` shows it then. Subclasses may hold their numbers
  // elsewhere, tensors of transforms such as vmap have no numbers, and those of negative views (`torch.Tensor.is_neg`)
  // have the other sign: they are not read.
  static bool read(py::handle object, TensorView* view) {
    const PyTypeObject* type = Py_TYPE(object.ptr());
    if (api_ == nullptr || (type != tensor_ && type != parameter_)) return false;
    if (api_->view_of_object(object.ptr(), view) != 0) {
      PyErr_Clear();
      return false;
    }
    if (view->device_type != 1 || (view->data == nullptr && view->has_numbers())) return false;  // 1 is kDLCPU
    view->data = static_cast<char*>(view->data) + view->byte_offset;
    return view->dtype() < 0 || !is_negative(object);
  }

 private:
  static bool is_negative(py::handle object) {
    PyObject* tensor = object.ptr();
    PyObject* found = PyObject_Vectorcall(is_negative_, &tensor, 1, nullptr);
    if (found == nullptr) PyErr_Clear();
    Py_XDECREF(found);  // of the two constants of type bool, which stay
    return found != Py_False;
  }

  inline static const ExchangeApi* api_ = nullptr;
  inline static PyObject* is_negative_ = nullptr;
  inline static const PyTypeObject *tensor_ = nullptr, *parameter_ = nullptr;
};

}  // namespace

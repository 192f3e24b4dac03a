#include <nanobind/nanobind.h>
NB_MODULE(_native, m) { m.def("one", [] { return 1; }); }

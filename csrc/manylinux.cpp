// Definitions of what this compiler's headers call but the oldest systems of a manylinux_2_28 wheel
// lack. Part of a library that is linked for an older glibc, see MMSOFTPOOL_GLIBC in setup.py.
#include <sys/single_threaded.h>

#include <sstream>

// libstdc++ has these constructors from GCC 9 on, RHEL 8 that of GCC 8. torch's messages use them.
template std::ostringstream::basic_ostringstream();
template std::stringstream::basic_stringstream();

// In glibc from 2.32 on. 0 means that there may be other threads: std::shared_ptr counts
// atomically.
char __libc_single_threaded = 0;

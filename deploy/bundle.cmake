# cmake -DPROGRAMS="a;b" -DINTO=DIR -P bundle.cmake: copies the shared libraries that the programs need and that a
# machine with only the driver, CUDA and a C library may lack.
file(GET_RUNTIME_DEPENDENCIES EXECUTABLES ${PROGRAMS}
    RESOLVED_DEPENDENCIES_VAR found UNRESOLVED_DEPENDENCIES_VAR missing
    PRE_EXCLUDE_REGEXES "^ld-linux" "^lib(c|m|dl|rt|pthread|gcc_s|stdc\\+\\+|cuda|cudart|cublas|cublasLt|nccl)\\.so")
if(missing)
    message(FATAL_ERROR "not found: ${missing}")
endif()
file(MAKE_DIRECTORY ${INTO})
foreach(library ${found})
    file(COPY ${library} DESTINATION ${INTO} FOLLOW_SYMLINK_CHAIN)
endforeach()

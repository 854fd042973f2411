# Local ops of the execution layer against the reference, and tests of clients in processes of their own.
set(epd_gpu_backend ${CMAKE_CURRENT_LIST_DIR})

add_executable(test_gpu_expert ${epd_gpu_backend}/harness_cuda.c ${epd_gpu_backend}/cases.c ${epd_gpu_backend}/expert_cases.c
    ${epd_gpu_backend}/../../unit/ep/harness.c ${epd_gpu_backend}/../../unit/ep/test_expert.c)
set_source_files_properties(${epd_gpu_backend}/../../unit/ep/test_expert.c PROPERTIES
    COMPILE_OPTIONS "-include;tests/gpu/backend/expert_cases.h")
target_link_libraries(test_gpu_expert PRIVATE epd_ep epd_test_reference PkgConfig::CHECK CUDA::cudart_static)
add_test(NAME gpu_backend_expert COMMAND test_gpu_expert)

foreach(name local recover reclaim)
    add_executable(test_gpu_${name} ${epd_gpu_backend}/process.c ${epd_gpu_backend}/test_${name}.c)
    target_link_libraries(test_gpu_${name} PRIVATE epd_client CUDA::cudart_static m)
    add_test(NAME gpu_backend_${name} COMMAND test_gpu_${name} $<TARGET_FILE:epd> $<$<STREQUAL:${name},reclaim>:$<TARGET_FILE:epdctl>>
        COMMAND_EXPAND_LISTS)
endforeach()
set_tests_properties(gpu_backend_expert gpu_backend_local gpu_backend_recover gpu_backend_reclaim PROPERTIES
    LABELS gpu SKIP_RETURN_CODE 77 TIMEOUT 300)
set_target_properties(test_gpu_expert test_gpu_local test_gpu_recover test_gpu_reclaim PROPERTIES
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/backend)

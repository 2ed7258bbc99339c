# Functions of the top CMakeLists.txt; included by it alone.

# our sources join upstream's target from outside, so that src/CMakeLists.txt needs no patch
function(zoomr_attach target)
    set(dir ${ZOOMR_NATIVE_DIR})
    set(sources ${dir}/zoomr.cpp ${dir}/zoomr-graph.cpp ${dir}/zoomr-heads.cpp
                ${dir}/zoomr-heads-api.cpp ${dir}/zoomr-heads-exchange.cpp ${dir}/zoomr-heads-graph.cpp ${dir}/zoomr-index.cpp ${dir}/zoomr-log.cpp
                ${dir}/zoomr-memory.cpp ${dir}/zoomr-pack.cpp ${dir}/zoomr-page.cpp ${dir}/zoomr-state.cpp ${dir}/zoomr-support.cpp)
    target_sources(${target} PRIVATE ${sources})
    target_include_directories(${target} PRIVATE ${dir})
    # upstream unites model files in groups of 16; ours would be merged with them and names could collide
    set_source_files_properties(${sources} TARGET_DIRECTORY ${target} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    set_source_files_properties(${dir}/zoomr.cpp TARGET_DIRECTORY ${target} PROPERTIES
        COMPILE_DEFINITIONS "ZOOMR_ENGINE_VERSION=\"${ENGINE_VERSION}\"")
    if (WIN32)
        set_target_properties(${target} PROPERTIES WINDOWS_EXPORT_ALL_SYMBOLS ON)
    endif()
endfunction()

# every shared library (or loadable backend) defined at or below a source directory
function(zoomr_shared_targets variable dir)
    get_property(found DIRECTORY ${dir} PROPERTY BUILDSYSTEM_TARGETS)
    set(shared "")
    foreach (target ${found})
        get_target_property(type ${target} TYPE)
        if (type MATCHES "^(SHARED|MODULE)_LIBRARY$")
            list(APPEND shared ${target})
        endif()
    endforeach()
    get_property(subdirs DIRECTORY ${dir} PROPERTY SUBDIRECTORIES)
    foreach (subdir ${subdirs})
        zoomr_shared_targets(below ${subdir})
        list(APPEND shared ${below})
    endforeach()
    set(${variable} ${shared} PARENT_SCOPE)
endfunction()

# libraries that find each other in their own folder; no version suffix, as a wheel cannot hold symbolic links
function(zoomr_place targets dir)
    if (APPLE)
        set(origin "@loader_path")
    else()
        set(origin "$ORIGIN")
    endif()
    foreach (target ${targets})
        set_target_properties(${target} PROPERTIES
            LIBRARY_OUTPUT_DIRECTORY ${dir} RUNTIME_OUTPUT_DIRECTORY ${dir}
            INSTALL_RPATH ${origin} BUILD_WITH_INSTALL_RPATH ON)
        set_property(TARGET ${target} PROPERTY VERSION)
        set_property(TARGET ${target} PROPERTY SOVERSION)
        set_property(TARGET ${target} PROPERTY PUBLIC_HEADER)
    endforeach()
endfunction()

# a second libllama from the unpatched source. ggml has no patch, so both share it: what the tests compare
# differs in libllama alone, and half of the build time is saved
function(zoomr_add_stock target dir sources out)
    get_directory_property(core DIRECTORY ${ENGINE_DIR}/src DEFINITION LLAMA_CORE_SOURCES)
    set(stock_sources "")
    set(stock_core "")
    foreach (source ${sources})
        cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY ${ENGINE_DIR}/src NORMALIZE OUTPUT_VARIABLE path)
        cmake_path(RELATIVE_PATH path BASE_DIRECTORY ${ENGINE_DIR})
        list(APPEND stock_sources ${dir}/${path})
        if (NOT path MATCHES "^src/models/")
            list(APPEND stock_core ${dir}/${path})
        endif()
    endforeach()
    add_library(${target} SHARED ${stock_sources})
    set_source_files_properties(${stock_core} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    get_target_property(binary_dir llama BINARY_DIR) # holds the generated llama-version.h
    target_include_directories(${target} PRIVATE ${dir}/src ${binary_dir} PUBLIC ${dir}/include)
    target_compile_features(${target} PRIVATE cxx_std_17)
    target_compile_definitions(${target} PRIVATE LLAMA_BUILD PUBLIC LLAMA_SHARED)
    target_link_libraries(${target} PUBLIC ggml)
    set_target_properties(${target} PROPERTIES OUTPUT_NAME llama UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16
        POSITION_INDEPENDENT_CODE ON WINDOWS_EXPORT_ALL_SYMBOLS ON)
    zoomr_place(${target} ${out})
    # a folder that LLAMA_CPP_LIB_PATH can point at holds ggml too
    foreach (library ${libraries})
        if (NOT library STREQUAL "llama")
            add_custom_command(TARGET ${target} POST_BUILD
                COMMAND ${CMAKE_COMMAND} -E copy_if_different $<TARGET_FILE:${library}> ${out}
                VERBATIM)
            add_dependencies(${target} ${library})
        endif()
    endforeach()
endfunction()

# CMake reads this in llama.cpp's project. The Python binding turns llama.cpp's common library on, which
# takes a quarter of the time to build and is used by llama.cpp's programs only.
set(LLAMA_BUILD_COMMON OFF)

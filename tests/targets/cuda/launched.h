/* Entries of emulated kernels for a driver: addresses of arguments, extents of grid and block. */
#pragma once
template <typename... P, size_t... I>
void launch_with(const char *name, void (*kernel)(P...), void **parameters, std::index_sequence<I...>) {
  auto run = [&] { kernel(*(P *)parameters[I]...); };
  using Run = decltype(run);
  emulated::launch(name, true, [](void *it) { (*(Run *)it)(); }, &run);
}
template <typename... P>
void launch_as(const char *name, void (*kernel)(P...), void **parameters, const int *e) {
  emulated::grid_extent = {e[0], e[1], e[2]};
  emulated::block_extent = {e[3], e[4], e[5]};
  launch_with(name, kernel, parameters, std::make_index_sequence<sizeof...(P)>());
}
#define LAUNCHED(KERNEL)                                                            \
  extern "C" void launch_##KERNEL(void **parameters, const int *extents) {          \
    launch_as(#KERNEL, KERNEL, parameters, extents);                                \
  }

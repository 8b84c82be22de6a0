"""The engine on an NVIDIA GPU, read in this order. Only `engine.build` imports it, when it is needed.

build     loads a model and puts the parts together
runner    runs steps: decode graphs, prompts eagerly; block holds a step's metadata
lane      long prompts beside decode steps
forward   one pass of a model; ops its operations, values and args what they take
gemv, grouped, kernels    products with packed weights; how kernels are compiled and launched
attention, decode, kv     attention of prompts, of decode steps, and their pages
router, experts           choice of experts, experts in VRAM
handoff, probe, overlap   experts that the CPU computes inside a graph
stream, copies, cpu_part  experts of prompts, shared between GPU and CPU, by rates from calibrate
"""

"""What to change when a run is out of memory."""



def out_of_memory_hint(batch_size, accumulation, processes, checkpointing, zero1, fsdp):
    """What to do when memory runs out, in one line: the cheapest first, without what is on already or cannot be.

    batch_size, accumulation: batch_size and gradient_accumulation_steps; checkpointing: activation_checkpointing;
    zero1, fsdp: whether they are on. Smaller batches with more of them leave the step, and so the run, what it is.
    """
    advice = []
    parts = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), None)
    if parts == 2:
        advice += [f"halve batch_size (--batch_size={batch_size // 2})",
                   f"double gradient_accumulation_steps (--gradient_accumulation_steps={2 * accumulation})"]
    elif parts:
        advice += [f"--batch_size={batch_size // parts} with --gradient_accumulation_steps={parts * accumulation}"]
    if checkpointing != "full":
        advice.append("--activation_checkpointing=full")
    if processes > 1 and not (zero1 or fsdp):
        advice.append("--use_zero1=True")
    if processes > 1 and not fsdp:
        advice.append("--use_fsdp=True")
    return "out of memory: " + ", then ".join(advice or ["a smaller block_size, n_embd or n_layer, or more processes"])

"""`urlvr plan`: what a run will need and how long a step may take, before any GPU is asked for.

config + GPU + count ─► crew (who trains, who serves) ─► checks
    shards     one rank of each kind built by the policy's own builder, on tensors without memory ─► bytes
    memory     shards + activations in flight + what a phase needs for a moment ─► fits, or does not
    speed      FLOPs, bubble, messages: seconds of score and train under named assumptions
    generate   seconds of the servers, for responses and for what providers ask
    sync       buckets of each pipeline stage
"""

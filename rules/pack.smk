# Step 4: one shard's dump becomes Parquet.
rule pack:
    input:
        rules.generate.output[0],
    output:
        f"{RESULTS}/{{model}}/{{run}}/{{label}}/parts/{{shard}}.json",
    log:
        f"{RESULTS}/logs/pack/{{model}}/{{run}}/{{label}}/{{shard}}.log",
    benchmark:
        f"{RESULTS}/logs/pack/{{model}}/{{run}}/{{label}}/{{shard}}.bench.tsv"
    conda:
        "../envs/pack.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: attempt * 1500,
        runtime=lambda wildcards, attempt: attempt * 120,
    params:
        workload=f"{RESULTS}/{{model}}/{{run}}/{{label}}/workload",
        packing=lambda wildcards: options(STUDY.runs[wildcards.run].packing),
        source=source_hash("packing.pack"),
    message:
        "Packing shard {wildcards.shard} of {wildcards.model}, run {wildcards.run}, under {wildcards.label}"
    shell:
        "sparsetrace pack {input:q} --workload {params.workload:q} --out {output:q} --threads {threads} {params.packing}"
        " > {log:q} 2>&1"

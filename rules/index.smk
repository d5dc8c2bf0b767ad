# Step 4, once all shards are packed: tables, data card and manifest.
rule index:
    input:
        lambda wildcards: expand(
            rules.pack.output[0],
            shard=STUDY.shards(wildcards.run),
            model=wildcards.model,
            run=wildcards.run,
            label=wildcards.label,
        ),
    output:
        f"{RESULTS}/{{model}}/{{run}}/{{label}}/workload/manifest.json",
    log:
        f"{RESULTS}/logs/index/{{model}}/{{run}}/{{label}}.log",
    benchmark:
        f"{RESULTS}/logs/index/{{model}}/{{run}}/{{label}}.bench.tsv"
    conda:
        "../envs/pack.yaml"
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        workload=subpath(output[0], parent=True),
        source=source_hash("pack"),
    message:
        "Indexing {wildcards.model}, run {wildcards.run}, under {wildcards.label}"
    shell:
        "sparsetrace index {input:q} --workload {params.workload:q} > {log:q} 2>&1"

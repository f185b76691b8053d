//! cargo run -p hypercast-kernels --features cuda --example cuda_source -- FOLDER
//!
//! Writes the tensor-core kernels as CUDA C++ for GPUs with the shared memory of an A100 and of an
//! H100: one file per kernel and head width, and one line of JSON per file on standard output.
//! Needs neither a GPU nor CUDA. `cuda/check.py` runs this example and compiles its output.

use std::path::PathBuf;

use anyhow::{Context, Result};
use burn::tensor::DType;
use hypercast_kernels::gpu::source::{BiasTables, MmaKernel, PlanRequest, cuda, nvidia, plan};

/// Compute capability and bytes of shared memory that a workgroup may have.
const DEVICES: [(u32, usize); 2] = [(80, 163 << 10), (90, 227 << 10)];

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).context("usage: cuda_source FOLDER")?;
    let folder = PathBuf::from(folder);
    std::fs::create_dir_all(&folder)?;
    let kernels = [
        (MmaKernel::Forward, "forward"),
        (MmaKernel::BackwardQueries, "backward_queries"),
        (MmaKernel::BackwardKeys, "backward_keys"),
    ];
    for (capability, shared_bytes) in DEVICES {
        let device = nvidia(shared_bytes);
        for (width, biased) in [(32, false), (64, false), (64, true), (128, false), (256, false)] {
            for (kernel, name) in kernels {
                let tables = BiasTables { position: biased, time: biased };
                let dtype = DType::BF16;
                let wanted =
                    PlanRequest { qk: width, v: width, dtype, position: biased, aligned: true };
                let plan = plan(kernel, &wanted, &device).context("no plan fits")?;
                let source = cuda(kernel, plan, tables, &device)?;
                let biases = if biased { "_biased" } else { "" };
                let file = format!("{name}_{width}{biases}_sm{capability}.cu");
                std::fs::write(folder.join(&file), source.code)?;
                println!(
                    r#"{{"file": "{file}", "capability": {capability}, "units": {}, "rows": {}, "columns": {}, "buffers": {}, "shared_bytes": {}, "planned_bytes": {}}}"#,
                    plan.units(),
                    plan.rows(),
                    plan.columns,
                    plan.buffers,
                    source.shared_bytes,
                    plan.shared_bytes(kernel, &wanted),
                );
            }
        }
    }
    Ok(())
}

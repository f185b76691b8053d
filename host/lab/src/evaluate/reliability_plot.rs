//! Reliability curves as part of an evaluation's SVG: a square a task, a line an arm.

use hypercast_train::report::ALL;

use super::plot::{ARMS, WIDTH, escape, label, line};
use crate::reliability::{Reliability, ReliabilityBin, ReliabilityCurve};

/// Squares beside one another.
const COLUMNS: usize = 3;
/// The size of a square with its labels.
const CELL: f64 = 290.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 40.0;
const RIGHT: f64 = 14.0;

/// A place for the curves of one task: its edges, and the largest rate of the axes.
struct Square {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
    most: f64,
}

impl Square {
    fn point(&self, predicted: f64, observed: f64) -> [f64; 2] {
        let [x, y] = [predicted, observed].map(|rate| (rate / self.most).clamp(0.0, 1.0));
        [self.left + x * (self.right - self.left), self.bottom - y * (self.bottom - self.top)]
    }
}

/// Draws the curves over all surfaces from `top` on, and returns where they end.
pub(super) fn draw(svg: &mut String, top: f64, Reliability(curves): &Reliability) -> f64 {
    let drawn: Vec<&ReliabilityCurve> =
        curves.iter().filter(|curve| curve.surface == ALL).collect();
    let tasks: Vec<&[&ReliabilityCurve]> = drawn.chunk_by(|a, b| a.task == b.task).collect();
    let left = (WIDTH - COLUMNS as f64 * CELL) / 2.0;
    for (at, curves) in tasks.iter().enumerate() {
        let [x, y] = [at % COLUMNS, at / COLUMNS].map(|cells| cells as f64 * CELL);
        square(svg, [left + x, top + y], curves);
    }
    top + tasks.len().div_ceil(COLUMNS) as f64 * CELL
}

fn square(svg: &mut String, [x, y]: [f64; 2], curves: &[&ReliabilityCurve]) {
    let arms = || {
        ARMS.iter().filter_map(|(arm, _, colour)| {
            let curve = curves.iter().find(|curve| curve.arm == *arm)?;
            Some((&curve.bins, colour))
        })
    };
    let rates = |bin: &ReliabilityBin| bin.predicted.max(bin.observed);
    let most = arms().flat_map(|(bins, _)| bins.iter().map(rates)).fold(0.0, f64::max);
    let square = Square {
        left: x + LEFT,
        top: y + TOP,
        right: x + CELL - RIGHT,
        bottom: y + CELL - BOTTOM,
        most: if most > 0.0 { most } else { 1.0 },
    };
    let Square { left, top, right, bottom, most } = square;
    let task = curves.first().map_or("", |curve| &curve.task);
    let title = format!("<tspan font-weight=\"bold\">reliability of {}</tspan>", escape(task));
    label(svg, left, top - 10.0, "start", &title);
    for tick in 0..=4 {
        let rate = most * f64::from(tick) / 4.0;
        let [x, y] = square.point(rate, rate);
        line(svg, [left, y, right, y], "\"#ddd\"");
        label(svg, left - 6.0, y + 4.0, "end", &format!("{rate:.3}"));
        if tick % 2 == 0 {
            label(svg, x, bottom + 16.0, "middle", &format!("{rate:.3}"));
        }
    }
    label(svg, (left + right) / 2.0, bottom + 32.0, "middle", "predicted; upwards observed");
    line(svg, [left, bottom, right, top], "\"#888\" stroke-dasharray=\"4 3\"");
    for (bins, colour) in arms() {
        let places = bins.iter().map(|bin| {
            let [x, y] = square.point(bin.predicted, bin.observed);
            format!("{x:.1},{y:.1}")
        });
        let places = places.collect::<Vec<_>>().join(" ");
        *svg += &format!(
            "<polyline points=\"{places}\" fill=\"none\" stroke=\"{colour}\" \
             stroke-width=\"1.8\"/>\n"
        );
    }
}

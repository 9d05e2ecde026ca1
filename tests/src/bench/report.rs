//! What was measured: samples on their way from the host, and the rows of a report.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// What one program measured in one boot of a host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// `wall`, or `icount` where the host's clock advances with its instructions.
    pub(crate) mode: String,
    /// What the host is.
    pub(crate) host: BTreeMap<String, String>,
    /// Every sample that was taken.
    pub(crate) series: Vec<Series>,
    /// The phases of one start with Vial: what had happened, and when, in ms since the first.
    pub(crate) timeline: Vec<(String, f64)>,
}

/// The samples of one measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// What was measured.
    pub(crate) id: String,
    /// Of what.
    pub(crate) subject: String,
    /// The samples' unit.
    pub(crate) unit: String,
    /// In the order in which they were taken; never empty.
    pub(crate) samples: Vec<f64>,
}

/// A row of `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) id: String,
    pub(crate) subject: String,
    pub(crate) mode: String,
    pub(crate) unit: String,
    pub(crate) n: usize,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) host: BTreeMap<String, String>,
    pub(crate) rows: Vec<Row>,
}

/// The middle of the samples; of an even number, the mean of the two in the middle.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

impl Report {
    /// The rows of what was measured, in the order of the measurements.
    pub(crate) fn of(all: &[Measured]) -> Self {
        let row = |mode: &str, series: &Series| Row {
            id: series.id.clone(),
            subject: series.subject.clone(),
            mode: mode.to_owned(),
            unit: series.unit.clone(),
            n: series.samples.len(),
            median: median(&series.samples),
            min: series.samples.iter().copied().fold(f64::INFINITY, f64::min),
            max: series.samples.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        };
        Self {
            host: all.iter().flat_map(|measured| measured.host.clone()).collect(),
            rows: all
                .iter()
                .flat_map(|measured| measured.series.iter().map(|s| row(&measured.mode, s)))
                .collect(),
        }
    }

    /// A row.
    pub(crate) fn row(&self, id: &str, subject: &str, mode: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.id == id && row.subject == subject && row.mode == mode)
    }

    /// The rows as a table, each with its ratio to what runc took.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{:<24} {:<12} {:<7} {:>10} {:>10} {:>10} {:>4}  {:<4} {:>8}\n",
            "MEASURED", "OF", "MODE", "MEDIAN", "LEAST", "MOST", "N", "UNIT", "TO RUNC"
        );
        for row in &self.rows {
            let ratio = match self.row(&row.id, "runc", &row.mode) {
                Some(runc) if row.subject != "runc" && runc.median > 0.0 => {
                    format!("{:.2}", row.median / runc.median)
                }
                _ => String::new(),
            };
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "{:<24} {:<12} {:<7} {:>10.2} {:>10.2} {:>10.2} {:>4}  {:<4} {ratio:>8}",
                row.id, row.subject, row.mode, row.median, row.min, row.max, row.n, row.unit
            );
        }
        text
    }
}

/// By how much samples of one program may differ for no reason, in milliseconds: those of a start from a template do, from one
/// boot of the host to the next, which is more than a few percent of so little.
const NOISE_MS: f64 = 1.0;

/// What has grown past the baseline by more than `percent` and [`NOISE_MS`], and rows of the baseline that are gone.
///
/// Only rows of ours that count instructions are compared: wall time depends on the machine. The
/// least sample of now is, with the baseline's median: containerd's threads make samples of one
/// program differ by as much as growth that has to be told, and what else a host does only ever
/// adds to one. Where runc takes more than it did, the host has another kernel or containerd, and
/// as much is allowed to ours.
pub(crate) fn grown(baseline: &Report, report: &Report, percent: f64) -> Vec<String> {
    let of_runc = |row: &&Row| row.mode == "icount" && row.subject == "runc";
    let host =
        baseline.rows.iter().filter(of_runc).filter_map(|old| {
            report.row(&old.id, "runc", "icount").map(|new| new.min / old.median)
        });
    let host = host.fold(1.0, f64::max);
    let counted = baseline.rows.iter().filter(|row| row.mode == "icount" && row.subject != "runc");
    counted
        .filter_map(|old| {
            let Some(new) = report.row(&old.id, &old.subject, "icount") else {
                return Some(format!("{} of {} was not measured", old.id, old.subject));
            };
            let expected = old.median * host;
            let change = (new.min / expected - 1.0) * 100.0;
            (change > percent && new.min - expected > NOISE_MS).then(|| {
                format!(
                    "{} of {} takes {:.2} {} instead of {expected:.2}: {change:+.1} %",
                    old.id, old.subject, new.min, new.unit
                )
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(mode: &str, samples: &[f64]) -> Measured {
        let series = |subject: &str| Series {
            id: "ctr_run".into(),
            subject: subject.into(),
            unit: "ms".into(),
            samples: samples.to_vec(),
        };
        Measured {
            mode: mode.into(),
            series: vec![series("runc"), series("vial-cold")],
            ..Measured::default()
        }
    }

    #[test]
    fn median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn rows_hold_the_spread_of_their_samples() {
        let report = Report::of(&[measured("wall", &[5.0, 1.0, 3.0])]);
        let row = report.row("ctr_run", "vial-cold", "wall").unwrap();
        assert_eq!((row.n, row.median, row.min, row.max), (3, 3.0, 1.0, 5.0));
        assert!(report.table().contains("1.00"), "{}", report.table());
    }

    /// One sample of ours in counted instructions, of runc's, and one of ours in time.
    fn counted(ours: &[f64], runc: f64) -> Report {
        let mut icount = measured("icount", ours);
        icount.series[0].samples = vec![runc];
        Report::of(&[icount, measured("wall", &[1.0])])
    }

    #[test]
    fn growth_past_the_limit_is_told_and_shrinking_is_not() {
        let old = counted(&[100.0], 80.0);
        let growth = |ours: &[f64], runc: f64| grown(&old, &counted(ours, runc), 5.0);
        assert_eq!(growth(&[104.9], 80.0), [""; 0]);
        assert_eq!(growth(&[50.0], 80.0), [""; 0]);
        assert_eq!(growth(&[105.1], 80.0).len(), 1);
        assert_eq!(growth(&[100.0, 180.0, 190.0], 80.0), [""; 0]);
        let gone = grown(&old, &Report::of(&[]), 5.0);
        assert!(gone[0].contains("not measured"), "{gone:?}");
    }

    #[test]
    fn growth_that_is_noise_is_not_told() {
        let old = counted(&[12.0], 80.0);
        let growth = |ours: f64| grown(&old, &counted(&[ours], 80.0), 5.0);
        assert_eq!((growth(12.9).len(), growth(13.1).len()), (0, 1));
    }

    #[test]
    fn host_that_costs_runc_more_may_cost_ours_as_much_more() {
        let old = counted(&[100.0], 80.0);
        let growth = |ours: f64, runc: f64| grown(&old, &counted(&[ours], runc), 5.0);
        assert_eq!(growth(115.0, 88.0), [""; 0]);
        assert_eq!(growth(116.0, 88.0).len(), 1);
        assert_eq!(growth(105.1, 40.0).len(), 1, "a faster host allows no less, and no more");
    }
}
